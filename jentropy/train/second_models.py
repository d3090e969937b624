"""Second models of a stage: settings that become learners once the policy is known.

Both are networks of the policy's shape with parameters of their own, which begin as a copy of the policy's at the start
of the stage. Settings that differ in numbers only share one compiled step.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jentropy import head
from jentropy.base import Array, Learner, Policy
from jentropy.learners.critic import critic
from jentropy.learners.implicit_reward import implicit_reward
from jentropy.train.optimizer import AdamW, compiled_part, init_optimizer, propose


@dataclasses.dataclass(frozen=True)
class _Optimizer:
    """The settings as what a learner takes; equal for equal settings."""

    config: AdamW

    def init(self, params: Any) -> Any:
        return init_optimizer(self.config, params)

    def update(self, gradient: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
        return propose(self.config, gradient, opt_state, params)


def _shifted(x: Array) -> Array:
    """`[B, T - 1]`, about tokens 1.., as `[B, T]` with 0 in column 0."""
    return jnp.pad(x, ((0, 0), (1, 0)))


class _Value(NamedTuple):
    """A linear head on the hidden states: 0 everywhere at the start."""

    policy: Policy

    def init(self, key: Array, params: Any) -> Any:
        del key
        tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        width = jax.eval_shape(self.policy.hidden, params, tokens).shape[-1]
        return {"body": jax.tree.map(jnp.copy, params), "head": jnp.zeros(width, jnp.float32)}

    def __call__(self, params: Any, tokens: Array) -> Array:
        hidden = self.policy.hidden(params["body"], tokens)[:, :-1].astype(jnp.float32)
        return _shifted(jnp.einsum("btd,d->bt", hidden, params["head"]))


class _LogProb(NamedTuple):
    """log π of each token at temperature 1, nats."""

    policy: Policy

    def init(self, key: Array, params: Any) -> Any:
        del key
        return jax.tree.map(jnp.copy, params)

    def __call__(self, params: Any, tokens: Array) -> Array:
        hidden = self.policy.hidden(params, tokens)[:, :-1]
        return _shifted(head.linear_scores(hidden, self.policy.unembed(params), tokens[:, 1:]).log_prob)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Critic:
    """A critic, which gives `value`; for `advantages.gae`. See `learners.critic`.

    Attributes:
      optimizer: its optimizer.
      cliprange_value: how far a value may move in the updates of one rollout, above 0.
      num_epochs, num_minibatches: updates per rollout are their product.
      num_microbatches: pieces of an update, for memory.
    """

    optimizer: AdamW = dataclasses.field(default_factory=AdamW)
    cliprange_value: float = 0.5
    num_epochs: int = 2
    num_minibatches: int = 2
    num_microbatches: int = 1

    provides: ClassVar[tuple[str, ...]] = ("value",)

    def make(self, policy: Policy) -> Learner:
        """The learner of a policy; raises `ValueError` if a number is out of range."""
        model = _Value(policy)
        return critic(
            init=model.init, value=model, optimizer=_Optimizer(self.optimizer), cliprange_value=self.cliprange_value,
            num_epochs=self.num_epochs, num_minibatches=self.num_minibatches, num_microbatches=self.num_microbatches,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImplicitReward:
    """PRIME's reward model, which gives `implicit_reward`; for `advantages.prime`. See `learners.implicit_reward`.

    Attributes:
      optimizer: its optimizer.
      beta: β, above 0.
      reference: "initial" or "policy".
      reward_column: of the accuracy.
      update_first: rewards are those of the model after its update on the rollout, verl's default, not before it.
      num_epochs, num_minibatches: updates per rollout are their product.
      num_microbatches: pieces of an update, for memory.
    """

    optimizer: AdamW = dataclasses.field(default_factory=AdamW)
    beta: float = 0.05
    reference: str = "initial"
    reward_column: int = 0
    update_first: bool = False
    num_epochs: int = 1
    num_minibatches: int = 1
    num_microbatches: int = 1

    provides: ClassVar[tuple[str, ...]] = ("implicit_reward",)

    def make(self, policy: Policy) -> Learner:
        """The learner of a policy; raises `ValueError` if a number is out of range."""
        model = _LogProb(policy)
        learner = implicit_reward(
            init=model.init, log_prob=model, optimizer=_Optimizer(self.optimizer), beta=self.beta,
            reference=self.reference, reward_column=self.reward_column, num_epochs=self.num_epochs,
            num_minibatches=self.num_minibatches, num_microbatches=self.num_microbatches,
        )  # fmt: skip
        return learner._replace(update_first=self.update_first)


SecondModel: TypeAlias = Critic | ImplicitReward


def compiled_model(model: SecondModel) -> SecondModel:
    """What of the settings is compiled into a step: all but the peak learning rate, which is part of the state."""
    return dataclasses.replace(model, optimizer=compiled_part(model.optimizer))
