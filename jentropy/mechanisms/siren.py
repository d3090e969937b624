"""SIREN: the nucleus entropy at the peaks of each response is held where it started."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jentropy import stats
from jentropy.base import Array, Mechanism, Output, Plan, Signals, hyper, require
from jentropy.compose import quantity

_OUTPUTS = {"paper": "nucleus_entropy", "released": "nucleus_entropy_released"}


class SirenState(NamedTuple):
    """τ as an exact ratio of int32, β, the target H* in nats and whether it is known (bool); scalars."""

    tau: stats.FractionParts
    beta: Array
    target: Array
    known: Array


def peaks(entropy: Array, mask: Array, tau: stats.FractionParts, *, strict: bool = False) -> Array:
    """The tokens at or above the τ-quantile of their row, or above it if `strict`; `[B, T]` bool.

    The quantile lies at position τ (n - 1), between two entries of the row; no other lies between them, so comparing
    with it is comparing with the upper one, or with the lower one if `strict`: nothing is interpolated or rounded.

    Args:
      entropy: `[B, T]` float.
      mask: `[B, T]` bool; each row's n entries.
      tau: τ in [0, 1].
      strict: above, not at. A row of equal entries then has no peak, otherwise it has nothing but peaks.
    """
    last = jnp.maximum(stats.count_true(mask, 1) - 1, 0)
    lower, rest = stats.fraction_divmod(last, tau)
    rank = lower if strict else lower + (rest > 0).astype(jnp.int32)
    threshold = jax.vmap(stats.order_statistic)(entropy, mask, rank)[:, None]
    return mask & ((entropy > threshold) if strict else (entropy >= threshold))


def peak_weight(peak: Array, mask: Array, average: str, dtype: jnp.dtype) -> Array:
    """Of each token in Ĥ, `[B, T]`: 1 / N over the N peaks, or the mean over rows of each row's mean over its peaks."""
    if average == "tokens":
        denominator = jnp.maximum(stats.count_true(peak), 1).astype(dtype)
        return jnp.where(peak, 1.0 / denominator, 0.0)
    rows = jnp.maximum(stats.count_true(jnp.any(mask, axis=1)), 1).astype(dtype)
    in_row = jnp.maximum(stats.count_true(peak, 1), 1).astype(dtype)
    return jnp.where(peak, (1.0 / (in_row * rows))[:, None], 0.0)


@dataclasses.dataclass(frozen=True)
class _Update:
    output: str
    strict: bool
    average: str

    def __call__(self, plan: Plan, state: SirenState, signals: Signals, key: Array) -> tuple[Plan, SirenState]:
        del key
        mask, entropy = signals.batch.loss_mask, signals.scores[self.output]
        dtype = entropy.dtype
        peak = peaks(entropy, mask, state.tau, strict=self.strict)
        weight = peak_weight(peak, mask, self.average, dtype)
        estimate, seen = jnp.sum(jnp.where(peak, weight * entropy, 0.0)), jnp.any(peak)
        target = jnp.where(state.known, state.target.astype(dtype), estimate)
        distance, beta = jnp.where(seen, estimate - target, 0.0), state.beta.astype(dtype)
        one, num_peaks = seen.astype(dtype), stats.count_true(peak).astype(dtype)
        plan = plan.raise_term(self.output, 2.0 * beta * distance * weight).report(
            siren__entropy=(estimate, one),
            siren__target=(jnp.where(seen, target, 0.0), one),
            siren__peak_fraction=(num_peaks, stats.count_true(mask).astype(dtype)),
            actor__penalty=(beta * jnp.square(distance), one),
        )
        return plan, state._replace(target=target.astype(state.target.dtype), known=state.known | seen)


def siren(
    *,
    top_p: float = 0.8,
    tau: float = 0.8,
    beta: float = 0.005,
    target: float | None = None,
    nucleus: str = "paper",
    strict: bool = False,
    average: str = "tokens",
) -> Mechanism:
    """Adds `β (Ĥ - H*)²` to the loss, where Ĥ is the entropy of likely ids at the peaks of each response.

        H'_t = entropy of π_t on its nucleus (the smallest set of most probable ids with mass >= p), renormalised
        peaks: H'_t >= the τ-quantile of H' in its response
        Ĥ = mean of H' over the peaks of the batch,   H* = Ĥ of the first update

    The square depends on the whole batch and enters by its exact linearisation: the coefficient `2 β (Ĥ - H*) ∂Ĥ/∂H'_t`
    of each H'_t. Nuclei, peaks and H* carry no gradient. H* is set by the first update that has a peak and is not
    skipped; there the gradient is 0. The penalty has two sides: an entropy above H* is pushed down.

    Many nuclei hold a single id, and where that is so for more than τ of a response the quantile is 0 and all its
    tokens are peaks; `strict` leaves those out.

    The released code is `nucleus="released", strict=True, average="rows"`. Its nucleus lacks the id that crosses p, so
    it is empty, with gradient 0, where one id has p. Rows without a peak count as 0 in its Ĥ. It works per micro-batch
    (see `compose.blockwise`), but takes H* from the whole first rollout, before its updates; it rounds the quantile to
    float32, and looks at the 10,000 most probable ids only. A row without response tokens counts in its mean over
    rows, but not here. Names there: `entropy_topp`, `mask_ratio`, `entropy_coeff`, `entropy_anchor`.

    Args:
      top_p: p, in (0, 1]; compiled into the step, unlike the other numbers. 1 is the entropy of the whole distribution.
      tau: τ, in [0, 1); 0 makes all tokens peaks.
      beta: β, finite and at least 0; 0 is the identity.
      target: H* in nats, finite and at least 0; None takes the first update's Ĥ.
      nucleus: `"paper"` or `"released"`.
      strict: a peak lies above the quantile, not at it.
      average: `"tokens"`, or `"rows"`: the mean over responses of the mean over their peaks.

    Raises:
      ValueError: a value is out of range.

    Reference: 2509.25133; code: github.com/Linn3a/siren.

    >>> siren(tau=0.5, target=1.0).update == siren().update
    True
    """
    require(0.0 < top_p <= 1.0, "top_p", top_p, "in (0, 1]")
    require(0.0 <= tau < 1.0, "tau", tau, "in [0, 1)")
    require(0.0 <= beta < float("inf"), "beta", beta, "finite and at least 0")
    require(target is None or 0.0 <= target < float("inf"), "target", target, "None, or finite and at least 0")
    require(nucleus in _OUTPUTS, "nucleus", nucleus, f"one of {sorted(_OUTPUTS)}")
    require(average in ("tokens", "rows"), "average", average, "tokens or rows")
    output = Output(_OUTPUTS[nucleus], float(top_p))

    def init() -> SirenState:
        return SirenState(stats.fraction_parts(tau), hyper(beta), hyper(target or 0.0), jnp.asarray(target is not None))

    return Mechanism(
        init=init,
        update=_Update(str(output), strict, average),
        outputs=(output,),
        terms={str(output): quantity(str(output))},
    )
