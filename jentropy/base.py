"""The types of jentropy: read this file first.

Every update is split in two. The *plan* sees the whole update batch, carries no gradient, may use a key and a
state, and writes per-token coefficients. The *loss* is differentiable, has no key and no state, and is a sum over
tokens:

    L(θ) = Σ_t w_t · surrogate_t(θ) + Σ_f Σ_t c_{f,t} · f_t(θ)

with `w` and `c` fixed before the gradient is taken. So the gradient is a plain sum over micro-batches and devices,
and no statistic of a method depends on how the batch was cut.

Letters used in shapes: B rows (responses), T token columns (prompt and response), V vocabulary, D width of the
hidden state, R reward functions. Entropies and log-probabilities are in nats. Column t is about token t:
`log_prob[:, t] = log π(tokens[:, t] | tokens[:, :t])`; column 0 is never scored and holds 0.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import struct

Array: TypeAlias = jax.Array
State: TypeAlias = Any
Quantities: TypeAlias = Mapping[str, Array]
Metrics: TypeAlias = Mapping[str, tuple[Array, Array]]


@struct.dataclass(kw_only=True)
class Rollouts:
    """The responses of one rollout, or the rows of one update: "the batch".

    Attributes:
      tokens: `[B, T]` int32, prompt then response, right padded.
      loss_mask: `[B, T]` bool, response tokens that may receive gradient.
      logp_sampler: `[B, T]` float, log-probability as the sampler computed it, at the sampling temperature, nats.
      logp_old: `[B, T]` float, the trainer's own score at the start of the rollout's updates: the denominator of the
        ratio.
      rewards: `[B, R]` float, one column per reward function.
      row_id: `[B]` int32, unique in the rollout. All randomness of a row is `fold_in(key, row_id)` and ties between
        tokens break by `(row_id, column)`, so order and padding of rows change nothing.
      group: `[B]` int32, rows with one id were drawn from the same state (prompt or prefix); ids lie in `[0, B)`.
      parent: `[B]` int32, the row this one was forked from, -1 for a root.
      fork: `[B]` int32, the first column that the row sampled itself.
      token_data: optional `[B, T]` floats by name, such as `ref_log_prob`, `value`, `temperature`.
      row_data: optional `[B, ...]` arrays by name, such as `answer_id`, `is_valid`, `truncated`, `accuracy`, and
        `reward_is_valid` `[B, R]`: False where one of several graders abstained.
    """

    tokens: Array
    loss_mask: Array
    logp_sampler: Array
    logp_old: Array
    rewards: Array
    row_id: Array
    group: Array
    parent: Array
    fork: Array
    token_data: Mapping[str, Array] = struct.field(default_factory=dict)
    row_data: Mapping[str, Array] = struct.field(default_factory=dict)


@struct.dataclass(kw_only=True)
class Signals:
    """What a mechanism reads: the whole update batch, scored, without gradient.

    Attributes:
      batch: the rows of this update.
      scores: `[B, T]` float by output name (`str(Output)`); `"log_prob"` is always there.
      step: int32 scalar, the rollout's number.
      update_index: int32 scalar, the update's number within its rollout. A controller that ticks once per rollout
        acts at `update_index == 0`.
    """

    batch: Rollouts
    scores: Mapping[str, Array]
    step: Array
    update_index: Array


@struct.dataclass(kw_only=True)
class Plan:
    """What the loss will do, per token. Mechanisms return a changed copy (`plan.replace(...)`).

    Attributes:
      advantage: `[B, T]` float.
      pg_weight: `[B, T]` float, weight of the policy-gradient loss of each token; starts as `loss_mask`, 0 means no
        policy gradient. Multiplied once by the normaliser's weight, after the chain.
      counted: `[B, T]` bool, tokens in the normaliser's denominator; starts as `loss_mask`.
      ratio_low: `[B, T]` float, lower bound of the clipped ratio; 0 is unclipped.
      ratio_high: `[B, T]` float, upper bound of the clipped ratio; inf is unclipped.
      terms: `[B, T]` float by term name: the coefficient of a differentiable quantity, final when raised (its
        denominator is inside). Two mechanisms that raise one term add up.
      constants: `[B, T]` float by name: what a term needs from the plan, such as a nucleus threshold.
      metrics: `(sum, count)` by name, divided once after all updates. Every mechanism reports what it did.
    """

    advantage: Array
    pg_weight: Array
    counted: Array
    ratio_low: Array
    ratio_high: Array
    terms: Mapping[str, Array] = struct.field(default_factory=dict)
    constants: Mapping[str, Array] = struct.field(default_factory=dict)
    metrics: Metrics = struct.field(default_factory=dict)

    def raise_term(self, name: str, coefficient: Array) -> "Plan":
        """Returns the plan with `coefficient` `[B, T]` added to the term's coefficient."""
        return self.replace(terms={**self.terms, name: self.terms.get(name, 0.0) + coefficient})

    def report(self, **metrics: tuple[Array, Array]) -> "Plan":
        """Returns the plan with `(sum, count)` metrics; keywords use `__` for `/`, and those of one name add up."""
        merged = dict(self.metrics)
        for keyword, (total, count) in metrics.items():
            name = keyword.replace("__", "/")
            before = merged.get(name, (jnp.zeros_like(total), jnp.zeros_like(count)))
            merged[name] = (before[0] + total, before[1] + count)
        return self.replace(metrics=merged)


class Output(NamedTuple):
    """A per-token quantity `[B, T]` that the policy's forward pass provides.

    `name` is one of `log_prob`, `entropy`, `log_normaliser`, `reference_kl` (D_KL(π || reference)),
    `reference_forward_kl` (D_KL(reference || π)), `nucleus_entropy` (argument: the probability mass p in (0, 1]; that
    of the smallest set of most probable ids that holds p, renormalised), `nucleus_entropy_released` (the same without
    the id that crosses p; 0 for an empty set).
    """

    name: str
    argument: float | None = None

    def __str__(self) -> str:
        return self.name if self.argument is None else f"{self.name}({self.argument!r})"


LOG_PROB = Output("log_prob")
ENTROPY = Output("entropy")

Term: TypeAlias = Callable[[Quantities, Plan, Rollouts], Array]
"""(quantities, plan rows, batch rows) -> `[b, T]`, differentiable, never mixes rows."""

Surrogate: TypeAlias = Callable[[Quantities, Plan, Rollouts], tuple[Array, Metrics]]
"""(quantities, plan rows, batch rows) -> (loss `[b, T]`, metrics as `(sum, count)`), never mixes rows."""

Normaliser: TypeAlias = Callable[[Array, Rollouts], Array]
"""(counted `[B, T]` bool, batch) -> weight `[B, T]`, applied to `pg_weight` once, after the chain."""


class Mechanism(NamedTuple):
    """One entropy mechanism: a sibling of `optax.GradientTransformation`.

    Attributes:
      init: `() -> State`. Numbers among the hyper-parameters are validated in the factory and carried here as
        arrays, so schedules and sweeps share one compilation.
      update: `(plan, state, signals, key) -> (plan, state)`. Sees the whole update batch. "key: consumed".
      outputs: what it needs scored, besides `LOG_PROB`.
      terms: the differentiable quantities whose coefficient `update` may raise.
      min_updates: updates per rollout below which it has no effect; building an experiment with fewer warns.
      requires: names in `row_data` and `token_data` that the rows must hold, such as `ref_log_prob` or `answer_id`;
        checked when an experiment is built.
    """

    init: Callable[[], State]
    update: Callable[[Plan, State, Signals, Array], tuple[Plan, State]]
    outputs: tuple[Output, ...] = ()
    terms: Mapping[str, Term] = {}
    min_updates: int = 1
    requires: tuple[str, ...] = ()


class Estimator(NamedTuple):
    """An advantage estimator, at rollout scope: it sees all rows of one rollout.

    Attributes:
      init: `(weights of the task's reward columns, or None: all 1) -> State`; the argument may be left out. Weights
        given to the estimator's factory come first.
      estimate: `(rollouts, state) -> (advantage [B, T], token_data to add, metrics, state)`.
      min_group_size: the smallest group it is defined for; checked when the objective is built.
      requires: as in `Mechanism`.
    """

    init: Callable[..., State]
    estimate: Callable[[Rollouts, State], tuple[Array, Mapping[str, Array], Metrics, State]]
    min_group_size: int = 1
    requires: tuple[str, ...] = ()


class Learner(NamedTuple):
    """A second model with its own parameters and optimizer (critic, implicit process reward, token Q).

    Attributes:
      init: `(key, params) -> State`, from the policy's parameters at the start of the stage; it copies what it keeps of
        them, for their buffers are donated.
      annotate: `(state, rollouts) -> token_data` to add to the rollouts, before the estimator.
      update: `(state, rollouts, key) -> (state, metrics)`, with what the estimator has added to the rollouts.
      update_first: the update comes before `annotate`, and so before the estimator.
    """

    init: Callable[[Array, Any], State]
    annotate: Callable[[State, Rollouts], Mapping[str, Array]]
    update: Callable[[State, Rollouts, Array], tuple[State, Metrics]]
    update_first: bool = False


class Policy(NamedTuple):
    """A causal language model as pure functions; parameters are a plain dict of arrays.

    Attributes:
      init: `key -> params`.
      hidden: `(params, tokens [B, T]) -> [B, T, D]`, the state after reading tokens `0..t`. Right padding needs no
        mask, because attention is causal.
      unembed: `params -> [V, D]`. Column t is scored from `hidden[:, t - 1]`.
      prefill: `(params, tokens [B, P], capacity) -> (hidden [B, P, D], cache)` with room for `capacity` tokens a row;
        axis 1 of every leaf of the cache is the row.
      decode: `(params, token [B], cache, position [B]) -> (hidden [B, D], cache)`: writes each row's own position,
        attends to indices up to it.
      logical_axes: `params`-shaped tree of tuples of logical axis names, one name (or None) per dimension.
      vocab_size: V.
    """

    init: Callable[[Array], Any]
    hidden: Callable[[Any, Array], Array]
    unembed: Callable[[Any], Array]
    prefill: Callable[[Any, Array, int], tuple[Array, Any]]
    decode: Callable[[Any, Array, Any, Array], tuple[Array, Any]]
    logical_axes: Callable[[], Any]
    vocab_size: int


class Objective(NamedTuple):
    """One method: what several parts must agree on stands here once.

    Attributes:
      estimator: advantage estimator, on the whole rollout.
      mechanisms: usually a `compose.chain`.
      surrogate: row-wise policy-gradient loss.
      normaliser: weight of each counted token.
      temperature: of sampling and scoring: every log-probability and entropy is that of softmax(logits / temperature).
    """

    estimator: Estimator
    mechanisms: Mechanism
    surrogate: Surrogate
    normaliser: Normaliser
    temperature: float = 1.0


def hyper(value: float) -> Array:
    """A hyper-parameter as a strongly typed float scalar of the default precision (float64 under x64)."""
    return jnp.asarray(value, jnp.result_type(float))


def require(condition: bool, name: str, value: object, rule: str) -> None:
    """Raises `ValueError` naming the hyper-parameter, the rule and the value unless `condition` holds."""
    if not condition:
        raise ValueError(f"{name} must be {rule}, got {value!r}")


def initial_plan(batch: Rollouts, advantage: Array) -> Plan:
    """The plan before any mechanism: every response token weighs 1, no clipping, no terms.

    Args:
      batch: the rows of the update.
      advantage: `[B, T]` float; entries outside `loss_mask` are ignored.
    """
    mask = batch.loss_mask
    return Plan(
        advantage=jnp.where(mask, advantage, 0.0),
        pg_weight=mask.astype(advantage.dtype),
        counted=mask,
        ratio_low=jnp.zeros_like(advantage),
        ratio_high=jnp.full_like(advantage, jnp.inf),
    )
