"""The entropy ledger of a step: what its updates did to the entropy, what theory says they do, and which tokens did it.

Everything is about the states of the step's own rollout, its response tokens, and about the parameters before and after
all of its updates. See `theory.ledger` for the decomposition.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jentropy import head, stats
from jentropy.base import Array, Metrics, Plan, Policy, Quantities, Rollouts, Surrogate, require
from jentropy.theory import covariance as covariance_lib
from jentropy.theory import ledger as theory
from jentropy.train.entropy_derivative import entropy_derivative
from jentropy.train.scoring import from_micro, to_micro

PREFIX = "ledger/"
"""How the names of its metrics begin."""

Marks: TypeAlias = Mapping[str, Array]
"""`[B, T]` bool by name: `clipped`, and `mechanism.<name>` for what each part of the chain touched."""


@dataclasses.dataclass(frozen=True)
class Ledger:
    """When a step is entered into the ledger.

    Attributes:
      every: rollouts between two entries, counted over the run.
      first_order_every: rollouts between two entries that have the first-order prediction in parameters as well, which
        costs more than all else; a multiple of `every`.
    """

    every: int = 1
    first_order_every: int = 10

    def __post_init__(self) -> None:
        require(self.every >= 1, "every", self.every, "at least 1")
        k = self.first_order_every
        require(k >= 1 and k % self.every == 0, "first_order_every", k, f"a positive multiple of every = {self.every}")


class Seen(NamedTuple):
    """What the ledger needs to know of a step.

    Attributes:
      rows: the rollout; `logp_old` is its score before the updates.
      advantage: `[B, T]`, as the estimator gave it.
      marks: of all updates.
    """

    rows: Rollouts
    advantage: Array
    marks: Marks


def update_marks(
    surrogate: Surrogate, scores: Quantities, plan: Plan, rows: Rollouts, touched: Marks, ok: Array
) -> Marks:
    """What happened to the tokens of one update; nothing if it was skipped.

    A token is clipped if it has a policy gradient to give, an advantage and a weight, and the surrogate's gradient to
    its log-probability is 0. For `surrogates.ratio` that is a ratio outside the plan's bounds on the side of the
    advantage, what `actor/pg_clipfrac` counts; a surrogate that never stops a gradient clips nothing.

    Args:
      surrogate: of the objective.
      scores: of the update's rows.
      plan: of the update, after the chain.
      rows: of the update; `logp_old` as the loss takes it.
      touched: by the chain's parts; see `compose.walk`.
      ok: bool scalar, whether the update was made.
    """

    def total(log_prob: Array) -> Array:
        return jnp.sum(jnp.where(rows.loss_mask, surrogate({**scores, "log_prob": log_prob}, plan, rows)[0], 0.0))

    live = rows.loss_mask & (plan.advantage != 0.0) & (plan.pg_weight != 0.0)
    clipped = live & (jax.grad(total)(scores["log_prob"]) == 0.0)
    found = {"clipped": clipped, **{f"mechanism.{name}": mark for name, mark in touched.items()}}
    return {name: mark & ok for name, mark in found.items()}


def merge_marks(marks: Marks, indices: Array, num_rows: int) -> Marks:
    """Marks of updates, `[U, b, T]`, on the rows of the rollout, `[B, T]`: set where at least one update has them.

    Args:
      marks: by name.
      indices: `[U, b]`, the rows of each update.
      num_rows: B.
    """
    return {
        name: jnp.zeros((num_rows, mark.shape[-1]), bool).at[indices.reshape(-1)].max(mark.reshape(-1, mark.shape[-1]))
        for name, mark in marks.items()
    }


def entropy_changes(
    policy: Policy, before: Any, after: Any, rows: Rollouts, temperature: float, num_microbatches: int = 1
) -> dict[str, Array]:
    """Entropy of every token's distribution before the updates, its change, and Lemma 1's prediction of the change.

    `lemma1` is -Cov_{a~π}(log π(a), z'(a) - z(a)), with π and the logits z before and z' after; 2505.22617, lemma 1.

    Args:
      policy: the model.
      before, after: parameters.
      rows: B rows; a row's own temperatures, `token_data["temperature"]`, take the place of `temperature`.
      temperature: of sampling.
      num_microbatches: parts in which it is computed; changes memory, not results.

    Returns:
      `entropy_before`, `entropy_change` and `lemma1`, `[B, T]` nats, 0 outside `loss_mask`; the last two are exactly 0
      if no parameter differs.
    """
    leaves = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    moved = jnp.any(jnp.stack([jnp.any(x != y) for x, y in leaves]))
    unembed, unembed_after = policy.unembed(before), policy.unembed(after)

    def changes(part: Rollouts) -> dict[str, Array]:
        tau = part.token_data["temperature"][:, 1:] if "temperature" in part.token_data else temperature
        # As in the scorer, so that the compiler takes it from there; the states after cost a pass of their own.
        hidden = policy.hidden(before, part.tokens)[:, :-1]
        hidden_after = policy.hidden(after, part.tokens[:, :-1])
        pair = head.pair_scores(hidden, unembed, hidden_after, unembed_after, temperature=tau)
        scores = head.linear_scores(hidden_after, unembed_after, part.tokens[:, 1:], temperature=tau)
        change = {"entropy_change": scores.entropy - pair.entropy, "lemma1": -pair.covariance}
        found = {"entropy_before": pair.entropy, **{k: jnp.where(moved, v, 0.0) for k, v in change.items()}}
        return {k: jnp.where(part.loss_mask, jnp.pad(v, ((0, 0), (1, 0))), 0.0) for k, v in found.items()}

    if num_microbatches == 1:
        return changes(rows)
    return from_micro(jax.lax.map(changes, to_micro(rows, num_microbatches)))


def _maybe(due: Array | None, compute: Callable[[], Metrics]) -> Metrics:
    """The metrics if they are due, always for None; else sums and counts that are 0."""
    if due is None:
        return compute()
    shapes = jax.eval_shape(compute)
    return jax.lax.cond(due, compute, lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes))


def _due(step: Array, every: int) -> Array | None:
    return None if every == 1 else step % every == 0


def partitions(seen: Seen, covariance: Array) -> dict[str, theory.Partition]:
    """The ways in which the tokens of a rollout are divided."""
    rows, marks = seen.rows, dict(seen.marks)
    mask = rows.loss_mask
    return {
        "difficulty": theory.by_difficulty(covariance_lib.difficulty_bin(theory.group_accuracy(rows)), mask),
        "advantage": theory.by_sign(seen.advantage, mask),
        "clipped": theory.by_mark(marks.pop("clipped"), mask, "yes", "no"),
        **{name: theory.by_mark(mark, mask, "touched", "untouched") for name, mark in marks.items()},
        "covariance_rank": theory.by_covariance_rank(covariance, mask, rows.row_id),
    }


def _response_covariance(seen: Seen) -> tuple[Array, Array]:
    """Summed over the prompts that have a response, and their number; an advantage is averaged over its response."""
    rows, mask = seen.rows, seen.rows.loss_mask
    log_prob = stats.masked_sum(rows.logp_old, mask, axis=1)
    advantage = stats.masked_mean(seen.advantage, mask, axis=1)
    lengths = jnp.sum(mask, axis=1, dtype=jnp.int32)
    found = covariance_lib.response_covariance(log_prob, advantage, lengths, rows.group, lengths > 0)
    there = found.num_responses > 0
    return jnp.sum(jnp.where(there, found.covariance, 0.0)), jnp.sum(there, dtype=log_prob.dtype)


def record(
    settings: Ledger, policy: Policy, temperature: float, num_microbatches: int, before: Any, after: Any, step: Array,
    seen: Seen,
) -> Metrics:  # fmt: skip
    """A step's entry as `(sum, count)` metrics; the counts of what is not due are 0.

    Args:
      settings: what is due when.
      policy: the model.
      temperature: of sampling.
      num_microbatches: parts in which the rows are swept.
      before, after: parameters before and after all updates of the step.
      step: int32 scalar, the rollout's number.
      seen: the rollout.
    """
    rows, mask = seen.rows, seen.rows.loss_mask
    arguments = (rows, temperature)

    def first_order() -> Metrics:
        tangent = jax.tree.map(jnp.subtract, after, before)
        slope = entropy_derivative(policy, before, tangent, *arguments, num_microbatches=num_microbatches)
        return {"first_order": (jnp.sum(slope), jnp.sum(mask, dtype=slope.dtype))}

    def entry() -> Metrics:
        values = entropy_changes(policy, before, after, *arguments, num_microbatches)
        covariance = covariance_lib.token_covariances(rows.logp_old, seen.advantage, mask)
        values["covariance"] = covariance
        number = jnp.sum(mask, dtype=covariance.dtype)
        whole = {name: (jnp.sum(value), number) for name, value in values.items()}
        del values["entropy_before"]
        parts = theory.contributions(values, partitions(seen, covariance), mask)
        return {**whole, "response_covariance": _response_covariance(seen), **parts}

    found = {
        **_maybe(_due(step, settings.every), entry),
        **_maybe(_due(step, settings.first_order_every), first_order),
    }
    return {PREFIX + name: value for name, value in found.items()}
