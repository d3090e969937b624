"""PRIME's reward model: a second causal language model whose log-ratio to a frozen one is a reward per token."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp

from jentropy import fitting, ratios, stats
from jentropy.base import Array, Learner, Metrics, Rollouts, hyper, require

LogProb: TypeAlias = Callable[[Any, Array], Array]

_ERROR = "error/accuracy is outside [0, 1]"
_REFERENCE = "implicit_reward_reference"


class ImplicitRewardState(NamedTuple):
    """Parameters, those of the frozen reference (none if that is the policy), the optimizer's state, and β."""

    params: Any
    reference: Any
    opt_state: Any
    beta: Array


def outcome_loss(log_prob: Array, reference: Array, mask: Array, accuracy: Array, beta: Array) -> Array:
    """The cross-entropy of σ(β Σ_t (log π_φ - log π_ref)) and the accuracy, per row `[B]`.

    From the logit, so its gradient β (σ - accuracy) does not vanish where σ rounds to 0 or 1, as that of the released
    code does. A row without tokens has log 2.

    Args:
      log_prob: `[B, T]` nats, differentiable.
      reference: `[B, T]` nats.
      mask: `[B, T]` bool.
      accuracy: `[B]` float in [0, 1].
      beta: β, a float scalar.
    """
    chex.assert_rank([accuracy, beta], [1, 0])
    logit = beta.astype(log_prob.dtype) * jnp.sum(ratios.log_ratio(log_prob, reference, mask), axis=1)
    return jnp.logaddexp(logit, 0.0) - accuracy * logit


def pairwise_accuracy(score: Array, accuracy: Array, group: Array, used: Array) -> tuple[Array, Array]:
    """How often, within groups, the row of the higher accuracy has the higher score: `(sum over groups, groups)`.

    Pairs weigh by their difference in accuracy; equal scores count half. A group without a pair that differs counts as
    0.5.

    Args:
      score: `[B]` float.
      accuracy: `[B]` float.
      group: `[B]` int32.
      used: `[B]` bool, the rows that take part.
    """
    chex.assert_rank([score, accuracy, group, used], 1)
    peer = used[:, None] & used[None, :] & (group[:, None] == group[None, :])
    score, accuracy = jnp.where(used, score, 0.0), jnp.where(used, accuracy, 0.0)
    weight = jnp.where(peer, jnp.maximum(accuracy[:, None] - accuracy[None, :], 0.0), 0.0)
    above = score[:, None] - score[None, :]
    right = jnp.where(above > 0.0, weight, jnp.where(above == 0.0, 0.5 * weight, 0.0))
    total, found = (stats.group_sum(jnp.sum(x, axis=1), group, used) for x in (weight, right))
    mean = jnp.where(total > 0.0, found / jnp.where(total > 0.0, total, 1.0), 0.5)
    index = jnp.arange(used.size)
    leads = used & ~jnp.any(peer & (index[None, :] < index[:, None]), axis=1)
    return stats.masked_sum(mean, leads), jnp.sum(leads, dtype=mean.dtype)


@dataclasses.dataclass(frozen=True)
class _Model:
    """How both models are scored."""

    log_prob: LogProb
    reference: str
    num_pieces: int

    def _score(self, params: Any, rollouts: Rollouts) -> Array:
        found = fitting.in_pieces(lambda tokens: self.log_prob(params, tokens), rollouts.tokens, self.num_pieces)
        return found.astype(rollouts.logp_old.dtype)

    def reference_log_prob(self, state: ImplicitRewardState, rollouts: Rollouts) -> Array:
        return rollouts.logp_old if self.reference == "policy" else self._score(state.reference, rollouts)

    def implicit_reward(self, state: ImplicitRewardState, rollouts: Rollouts, reference: Array) -> Array:
        return ratios.log_ratio(self._score(state.params, rollouts), reference, rollouts.loss_mask)


@dataclasses.dataclass(frozen=True)
class _Init:
    init: Callable[[Array, Any], Any]
    reference: str
    optimizer: fitting.Optimizer
    beta: float

    def __call__(self, key: Array, params: Any) -> ImplicitRewardState:
        params = self.init(key, params)
        reference = () if self.reference == "policy" else jax.tree.map(jnp.copy, params)
        return ImplicitRewardState(params, reference, fitting.start(self.optimizer, params).opt_state, hyper(self.beta))


@dataclasses.dataclass(frozen=True)
class _Annotate:
    model: _Model

    def __call__(self, state: ImplicitRewardState, rollouts: Rollouts) -> Mapping[str, Array]:
        reference = self.model.reference_log_prob(state, rollouts)
        return {"implicit_reward": self.model.implicit_reward(state, rollouts, reference)}


def _weigh(rows: Rollouts) -> Array:
    """1 / n for each of the n rows with tokens, `[M]`."""
    used = jnp.any(rows.loss_mask, axis=1)
    return used.astype(rows.logp_old.dtype) / jnp.maximum(stats.count_true(used), 1).astype(rows.logp_old.dtype)


@dataclasses.dataclass(frozen=True)
class _Update:
    model: _Model
    optimizer: fitting.Optimizer
    passes: fitting.Passes
    reward_column: int | None

    def _accuracy(self, rollouts: Rollouts, used: Array) -> tuple[Array, Array]:
        """The labels `[B]`, 0 where a row is not used, and the number of those outside [0, 1]."""
        if self.reward_column is None:
            accuracy = fitting.needed(rollouts.row_data, "accuracy", "the implicit reward", "row_data")
        else:
            num = rollouts.rewards.shape[1]
            require(self.reward_column < num, "reward_column", self.reward_column, f"below the {num} reward columns")
            accuracy = rollouts.rewards[:, self.reward_column]
        accuracy = jnp.where(used, accuracy.astype(rollouts.logp_old.dtype), 0.0)
        return accuracy, jnp.sum(~((accuracy >= 0.0) & (accuracy <= 1.0)), dtype=accuracy.dtype)

    def __call__(
        self, state: ImplicitRewardState, rollouts: Rollouts, key: Array
    ) -> tuple[ImplicitRewardState, Metrics]:
        tokens = fitting.used_tokens(rollouts)
        used = jnp.any(tokens, axis=1)
        accuracy, wrong = self._accuracy(rollouts, used)
        reference = self.model.reference_log_prob(state, rollouts)
        known = rollouts.token_data.get("implicit_reward")
        implicit = self.model.implicit_reward(state, rollouts, reference) if known is None else known
        score = jnp.sum(jnp.where(tokens, implicit, 0.0), axis=1)
        rollouts = rollouts.replace(
            token_data={**rollouts.token_data, _REFERENCE: reference},
            row_data={**rollouts.row_data, "accuracy": accuracy},
        )

        def loss(params: Any, rows: Rollouts, weight: Array) -> tuple[Array, Metrics]:
            log_prob = self.model.log_prob(params, rows.tokens).astype(weight.dtype)
            reference, label = rows.token_data[_REFERENCE], rows.row_data["accuracy"]
            return jnp.sum(weight * outcome_loss(log_prob, reference, rows.loss_mask, label, state.beta)), {}

        before = fitting.Fitted(state.params, state.opt_state)
        after, metrics = fitting.fit(loss, _weigh, self.optimizer, self.passes, before, rollouts, key)
        metrics = {f"reward_model/{'prm_loss' if name == 'loss' else name}": x for name, x in metrics.items()}
        metrics["reward_model/dpo_acc"] = pairwise_accuracy(score, accuracy, rollouts.group, used)
        metrics[_ERROR] = (wrong, jnp.ones_like(wrong))
        return state._replace(params=after.params, opt_state=after.opt_state), metrics


def implicit_reward(
    *,
    init: Callable[[Array, Any], Any],
    log_prob: LogProb,
    optimizer: fitting.Optimizer,
    beta: float = 0.05,
    reference: str = "initial",
    reward_column: int | None = 0,
    num_epochs: int = 1,
    num_minibatches: int = 1,
    num_microbatches: int = 1,
) -> Learner:
    """A process reward model that learns from outcomes alone.

        q_t = log π_φ(token t) - log π_ref(token t)
        L = mean over rows of BCE(σ(β Σ_t q_t), accuracy)

    `annotate` gives q as `token_data["implicit_reward"]`, for `advantages.prime`; the gradient goes into φ only. The
    mean is over the rows of a mini-batch that are valid and have response tokens, whatever the micro-batches. Every
    epoch deals the rows out anew (`fitting.minibatches`).

    The order is the caller's. Annotate, then update: the rewards are those of the model before its step, as PRIME's
    code runs. Update, then annotate: rescored, verl's default, one more forward pass.

    Reports `reward_model/prm_loss` (mean over updates), `reward_model/grad_norm`, `reward_model/skipped`, and
    `reward_model/dpo_acc`, `pairwise_accuracy` of the scores before the update, mean over groups, 0.5 for a group in
    which all accuracies are equal. The released code counts equal scores by the order of rows: half here. An accuracy
    outside [0, 1] stops a run.

    Args:
      init: `(key, params of the policy) -> params`; those of the policy itself after supervised learning, in PRIME.
      log_prob: `(params, tokens [B, T]) -> [B, T]` nats: column t is about token t.
      optimizer: such as an `optax.GradientTransformation`. PRIME: AdamW of 1e-6 without weight decay, clipped at 10.
      beta: β, finite and above 0.
      reference: `"initial"`: π_ref is a frozen copy of the model as `init` gives it; `"policy"`: it is `logp_old`.
      reward_column: the column of the rewards that is the accuracy, in [0, 1]; None: `row_data["accuracy"]` `[B]`.
      num_epochs: passes over a rollout.
      num_minibatches: updates of a pass.
      num_microbatches: pieces whose gradients are summed, and pieces of `annotate`: for memory only.

    Raises:
      ValueError: a value is out of range or unknown or, when traced, the column or `accuracy` is missing.

    Reference: 2502.01456, eq. 3 and 6; released code: PRIME-RL/PRIME, `dp_prime.py`.

    >>> import optax
    >>> parts = {"init": lambda key, _: jnp.zeros(1), "log_prob": lambda w, x: w * x}
    >>> learner = implicit_reward(**parts, optimizer=optax.sgd(0.1))
    >>> learner.init(jax.random.key(0), None).reference
    Array([0.], dtype=float32)
    """
    require(0.0 < beta < float("inf"), "beta", beta, "finite and above 0")
    require(reference in ("initial", "policy"), "reference", reference, "initial or policy")
    require(reward_column is None or reward_column >= 0, "reward_column", reward_column, "None or at least 0")
    passes = fitting.Passes(num_epochs, num_minibatches, num_microbatches)
    model = _Model(log_prob, reference, num_microbatches)
    return Learner(
        init=_Init(init, reference, optimizer, beta),
        annotate=_Annotate(model),
        update=_Update(model, optimizer, passes, reward_column),
    )
