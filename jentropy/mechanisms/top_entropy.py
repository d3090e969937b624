"""Top-entropy: policy gradient only for the tokens of highest entropy."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jentropy import stats
from jentropy.base import ENTROPY, Array, Mechanism, Plan, Signals, require

_SLACK = 10_000
"""A remainder of at least one over this rounds the number of tokens up."""


class TopEntropyState(NamedTuple):
    """The fraction as an exact ratio of int32."""

    top_entropy_quantile: stats.FractionParts


def num_selected(count: Array, fraction: stats.FractionParts) -> Array:
    """`max(1, ⌊ρ · count + 0.9999⌋)` in integer arithmetic, at most `count`; int32 of any shape, like `count`."""
    whole, rest = stats.fraction_divmod(count, fraction)
    rounded = whole + (rest >= (fraction.denominator - 1) // _SLACK + 1).astype(jnp.int32)
    return jnp.minimum(jnp.maximum(rounded, 1), count)


def _threshold(entropy: Array, mask: Array, fraction: stats.FractionParts) -> Array:
    """The entropy above which all tokens lie that exceed the (1 - ρ)-quantile; one scalar.

    The quantile lies at position (1 - ρ)(N - 1), between two entries; no other lies between them, so comparing with it
    is comparing with the upper one, of descending rank ⌊ρ (N - 1)⌋.
    """
    last = jnp.maximum(stats.count_true(mask) - 1, 0)
    return stats.order_statistic(entropy, mask, last - stats.fraction_of(last, fraction))


@dataclasses.dataclass(frozen=True)
class _Update:
    denominator: str
    scope: str
    rule: str

    def select(self, state: TopEntropyState, signals: Signals) -> Array:
        """The tokens that keep their policy gradient, `[B, T]` bool."""
        batch, fraction = signals.batch, state.top_entropy_quantile
        entropy, mask = signals.scores["entropy"], batch.loss_mask
        if self.rule == "quantile":
            if self.scope == "batch":
                return mask & (entropy >= _threshold(entropy, mask, fraction))
            threshold = jax.vmap(_threshold, (0, 0, None))(entropy, mask, fraction)
            return mask & (entropy >= threshold[:, None])
        if self.scope == "batch":
            return stats.top_k_mask(entropy, mask, num_selected(stats.count_true(mask), fraction), batch.row_id)
        return stats.row_top_k_mask(entropy, mask, num_selected(stats.count_true(mask, 1), fraction))

    def __call__(
        self, plan: Plan, state: TopEntropyState, signals: Signals, key: Array
    ) -> tuple[Plan, TopEntropyState]:
        del key
        mask, entropy, dtype = signals.batch.loss_mask, signals.scores["entropy"], plan.advantage.dtype
        selected = self.select(state, signals)
        plan = plan.replace(pg_weight=jnp.where(selected, plan.pg_weight, 0.0))
        if self.denominator == "selected":
            plan = plan.replace(counted=plan.counted & selected)
        count = stats.count_true(selected).astype(dtype)
        plan = plan.report(
            top_entropy__selected_fraction=(count, stats.count_true(mask).astype(dtype)),
            top_entropy__selected_entropy=(stats.masked_sum(entropy, selected), count),
        )
        return plan, state


def top_entropy(
    *,
    top_entropy_quantile: float = 0.2,
    denominator: str = "all",
    scope: str = "batch",
    rule: str = "topk",
) -> Mechanism:
    """Takes the policy gradient away from all but the fraction ρ of tokens with the highest entropy.

        S = the k response tokens of the batch with the highest H_t,   k = max(1, ⌊ρ N + 0.9999⌋)
        L = 1/N Σ_{t in S} loss_t

    H is the entropy of the current policy over the whole vocabulary. The count is exact; ties go to the lowest
    `(row_id, column)`. Terms of other mechanisms, such as an entropy bonus, keep all tokens. 1 is the identity.

    The paper and TRL divide by all N tokens; the official code, which this k is from, divides by the selected ones
    (`denominator="selected"`): then a token-mean loss is 1/ρ times as large. TRL's rule (`rule="quantile"`) compares
    with the (1 - ρ)-quantile by linear interpolation, inclusive: it keeps all tokens tied with the last one, all tokens
    if all are equal, and ⌊ρ (N - 1)⌋ + 1 without ties. Both select per micro-batch: see `compose.blockwise`. TRL also
    masks its entropy bonus. Known as `top_entropy_quantile` (TRL).

    Args:
      top_entropy_quantile: ρ, in (0, 1]. Not 0, for which the official code keeps one token and TRL all maxima.
      denominator: `"all"`, or `"selected"`: the normaliser counts the selected tokens only.
      scope: `"batch"`, or `"sequence"`: the fraction of each response, with N and ties of its own.
      rule: `"topk"` or `"quantile"`.

    Raises:
      ValueError: a value is out of range.

    Reference: 2506.01939, section 5.

    >>> top_entropy(top_entropy_quantile=0.5).update == top_entropy().update
    True
    """
    require(0.0 < top_entropy_quantile <= 1.0, "top_entropy_quantile", top_entropy_quantile, "in (0, 1]")
    require(denominator in ("all", "selected"), "denominator", denominator, "all or selected")
    require(scope in ("batch", "sequence"), "scope", scope, "batch or sequence")
    require(rule in ("topk", "quantile"), "rule", rule, "topk or quantile")
    return Mechanism(
        init=lambda: TopEntropyState(stats.fraction_parts(top_entropy_quantile)),
        update=_Update(denominator, scope, rule),
        outputs=(ENTROPY,),
    )
