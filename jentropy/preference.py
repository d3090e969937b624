"""H-DPO: preferences between two responses to one prompt, with a weight of its own on the policy's entropy.

A loss beside plan and surrogate: it compares rows two by two, so its unit is the pair. It is a sum over pairs whose
weights are fixed beforehand from the whole batch, so the number of micro-batches of pairs changes nothing.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import struct

from jentropy import outcome, stats
from jentropy.base import Array, Metrics, Rollouts, hyper, require

_LAST_ID = 2**31 - 1


@struct.dataclass(kw_only=True)
class Pairs:
    """Two responses to each of P prompts, the better and the worse one: row p of both belongs to pair p.

    Attributes:
      chosen: P rows; `loss_mask` marks the response, `token_data["ref_log_prob"]` `[P, T]` is the reference's score.
      rejected: P rows of the same kind; their number of columns may differ.
      valid: `[P]` bool. A pair that is False weighs nothing, whatever its rows hold.
    """

    chosen: Rollouts
    rejected: Rollouts
    valid: Array


class HDpoState(NamedTuple):
    """α, β and the label smoothing, scalars."""

    alpha: Array
    beta: Array
    label_smoothing: Array


class PairLoss(NamedTuple):
    """A loss on pairs.

    Attributes:
      init: `() -> State`: the hyper-parameters as arrays.
      loss: `(state, chosen_log_prob [P, T], rejected_log_prob [P, T], pairs, weight [P]) -> (scalar, metrics)`, a sum
        over pairs, differentiable in the two log-probabilities.
    """

    init: Callable[[], HDpoState]
    loss: Callable[[HDpoState, Array, Array, Pairs, Array], tuple[Array, Metrics]]


def pair_weight(pairs: Pairs) -> Array:
    """`1 / n` for each of the n valid pairs of the whole batch, 0 for the others, `[P]`; 0 if there is none."""
    count = stats.count_true(pairs.valid).astype(pairs.chosen.logp_old.dtype)
    return jnp.where(pairs.valid, 1.0 / jnp.maximum(count, 1.0), 0.0)


def _pick(candidates: Array, row_id: Array) -> Array:
    """The candidate `[P, B]` of lowest `row_id` of each group, as an index `[P]`; 0 where there is none."""
    return jnp.argmin(jnp.where(candidates, row_id[None, :], _LAST_ID), axis=1)


def select_pairs(rollouts: Rollouts, reward: Array, *, num_groups: int) -> tuple[Pairs, Metrics]:
    """One pair per group: the response of highest reward and the one of lowest; ties go to the lowest `row_id`.

    Rows with `row_data["is_valid"]` False and rows without a response token do not take part. A group whose rewards are
    all equal, or with fewer than two rows, has no loser: its pair is not valid, and it is counted.

    Args:
      rollouts: the rows of one rollout, groups in `[0, num_groups)`.
      reward: `[B]` float, such as `outcome.total_reward`.
      num_groups: P, at least 1.

    Returns:
      The pairs, pair p being group p, and `preference/groups_without_pair` over the groups that have a row at all. Ids
      out of range stop a run (`error/...`).

    Raises:
      ValueError: `num_groups` is below 1.
    """
    require(num_groups >= 1, "num_groups", num_groups, "at least 1")
    chex.assert_rank(reward, 1)
    chex.assert_type(reward, float)
    chex.assert_equal_shape([reward, rollouts.row_id])
    used = outcome.valid_rows(rollouts) & jnp.any(rollouts.loss_mask, axis=1)
    member = used[None, :] & (rollouts.group[None, :] == jnp.arange(num_groups, dtype=rollouts.group.dtype)[:, None])
    every = jnp.broadcast_to(reward[None, :], member.shape)
    best = jnp.max(every, axis=1, where=member, initial=-jnp.inf)
    worst = jnp.min(every, axis=1, where=member, initial=jnp.inf)
    chosen = _pick(member & (every == best[:, None]), rollouts.row_id)
    rejected = _pick(member & (every == worst[:, None]), rollouts.row_id)
    valid, populated = best > worst, jnp.any(member, axis=1)
    pairs = Pairs(
        chosen=jax.tree.map(lambda x: x[chosen], rollouts),
        rejected=jax.tree.map(lambda x: x[rejected], rollouts),
        valid=valid,
    )
    outside = used & ((rollouts.group < 0) | (rollouts.group >= num_groups))
    return pairs, {
        "preference/groups_without_pair": (
            jnp.sum(populated & ~valid, dtype=reward.dtype),
            jnp.sum(populated, dtype=reward.dtype),
        ),
        "error/a group is outside [0, num_groups)": (
            jnp.sum(outside, dtype=reward.dtype),
            jnp.ones((), reward.dtype),
        ),
    }


class _Response(NamedTuple):
    """One side of the pairs, each `[P]`: log-probability under policy and reference, number of tokens."""

    log_prob: Array
    ref_log_prob: Array
    length: Array


def _response(log_prob: Array, rows: Rollouts, valid: Array, side: str, length_normalised: bool) -> _Response:
    if "ref_log_prob" not in rows.token_data:
        raise ValueError(f"h_dpo needs token_data['ref_log_prob'] of the {side} rows, got {sorted(rows.token_data)}")
    chex.assert_rank([log_prob, valid], [2, 1])
    used = rows.loss_mask & valid[:, None]
    reduce = stats.masked_mean if length_normalised else stats.masked_sum
    scores = (log_prob, rows.token_data["ref_log_prob"])
    length = jnp.sum(used, axis=1, dtype=log_prob.dtype)
    return _Response(*(reduce(x, used, axis=1) for x in scores), length=length)


def _metrics(state: HDpoState, chosen: _Response, rejected: _Response, pair_loss: Array, valid: Array) -> Metrics:
    dtype = pair_loss.dtype
    alpha, beta = state.alpha.astype(dtype), state.beta.astype(dtype)
    good, bad = (alpha * beta * x.log_prob - beta * x.ref_log_prob for x in (chosen, rejected))
    means = {
        "h_dpo/loss": pair_loss,
        "h_dpo/length_difference": chosen.length - rejected.length,
        "rewards/chosen": good,
        "rewards/rejected": bad,
        "rewards/margins": good - bad,
        "rewards/accuracies": (good > bad).astype(dtype),
        "logps/chosen": chosen.log_prob,
        "logps/rejected": rejected.log_prob,
    }
    count = jnp.sum(valid, dtype=dtype)
    return {name: (stats.masked_sum(x, valid), count) for name, x in means.items()}


def h_dpo_loss(
    state: HDpoState,
    chosen_log_prob: Array,
    rejected_log_prob: Array,
    pairs: Pairs,
    weight: Array,
    *,
    length_normalised: bool = False,
) -> tuple[Array, Metrics]:
    """The loss of `h_dpo`, whose docstring has the formula.

    Args:
      state: α, β and ε.
      chosen_log_prob: `[P, T]` float, the policy's scores of the tokens of `pairs.chosen`.
      rejected_log_prob: `[P, T]` float, those of `pairs.rejected`.
      pairs: some pairs of the batch, or all.
      weight: `[P]` float, `pair_weight` of the whole batch.
      length_normalised: means over tokens in the place of sums.

    Returns:
      Σ weight · L, and as `(sum, count)` over the valid pairs `h_dpo/loss`, `h_dpo/length_difference` (tokens, chosen
      minus rejected), and under TRL's names the implicit reward `αβ log π - β log ref` (`rewards/chosen`,
      `rewards/rejected`), its difference (`rewards/margins`), how often that is above 0 (`rewards/accuracies`), and
      `logps/chosen`, `logps/rejected`.

    Raises:
      ValueError: `ref_log_prob` is missing.
    """
    chex.assert_equal_shape([weight, pairs.valid])
    chosen = _response(chosen_log_prob, pairs.chosen, pairs.valid, "chosen", length_normalised)
    rejected = _response(rejected_log_prob, pairs.rejected, pairs.valid, "rejected", length_normalised)
    alpha, beta, epsilon = (x.astype(chosen_log_prob.dtype) for x in state)
    h = alpha * beta * (chosen.log_prob - rejected.log_prob) - beta * (chosen.ref_log_prob - rejected.ref_log_prob)
    loss = -(1.0 - epsilon) * jax.nn.log_sigmoid(h) - epsilon * jax.nn.log_sigmoid(-h)
    total = jnp.sum(jnp.where(pairs.valid, weight * loss, 0.0))
    return total, _metrics(state, *jax.lax.stop_gradient((chosen, rejected, loss)), pairs.valid)


@dataclasses.dataclass(frozen=True)
class _Loss:
    length_normalised: bool

    def __call__(
        self, state: HDpoState, chosen_log_prob: Array, rejected_log_prob: Array, pairs: Pairs, weight: Array
    ) -> tuple[Array, Metrics]:
        normalised = self.length_normalised
        return h_dpo_loss(state, chosen_log_prob, rejected_log_prob, pairs, weight, length_normalised=normalised)


def h_dpo(
    *, alpha: float = 0.95, beta: float = 0.01, label_smoothing: float = 0.0, length_normalised: bool = False
) -> PairLoss:
    """DPO whose regulariser is `α E[log π] - E[log ref]`: α weighs the policy's own entropy.

        h = αβ (log π(y_w) - log π(y_l)) - β (log ref(y_w) - log ref(y_l))
        L = -(1 - ε) log σ(h) - ε log σ(-h)

    with y_w the chosen and y_l the rejected response, and log-probabilities summed over response tokens. The optimum is
    `π* ∝ ref^{1/α} exp(r / (αβ))`: α below 1 sharpens the policy, α above 1 raises its entropy, α = 1 is DPO.

    h holds `(α - 1) β (log π(y_w) - log π(y_l))`, an absolute log-probability, and so depends on the lengths of the two
    responses: watch `h_dpo/length_difference`. The batch is all pairs of an update, by way of `pair_weight`.

    Args:
      alpha: α, finite and above 0; the paper's range for sharper policies is 0.8 to 0.95.
      beta: β, finite and above 0. TRL's default for DPO is 0.1.
      label_smoothing: ε in [0, 0.5): how often a preference is taken to be the wrong way round.
      length_normalised: means over response tokens instead of sums, for policy and reference. Not the paper's; β is
        then per token, larger by the length of a response.

    Raises:
      ValueError: a value is out of range or, when traced, `ref_log_prob` is missing.

    Reference: 2411.07595; the loss is derived here from its regulariser. No released code is known. At α = 1
    it is the sigmoid loss of TRL 1.16's `DPOTrainer`.

    >>> h_dpo(alpha=0.9).loss == h_dpo(beta=0.1).loss
    True
    """
    require(0.0 < alpha < float("inf"), "alpha", alpha, "finite and above 0")
    require(0.0 < beta < float("inf"), "beta", beta, "finite and above 0")
    require(0.0 <= label_smoothing < 0.5, "label_smoothing", label_smoothing, "in [0, 0.5)")
    return PairLoss(
        init=lambda: HDpoState(hyper(alpha), hyper(beta), hyper(label_smoothing)),
        loss=_Loss(length_normalised),
    )
