"""Dynamic sampling: rounds of prompts are sampled until enough groups are found whose responses differ in accuracy.

A group in which all responses are right, or all wrong, has no advantage and dilutes the batch. Each round samples the
same number of prompts with one compiled program; the groups that vary take the free places of a rollout of fixed
shape, in the order in which they were drawn, and what is left over is cut.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jentropy import outcome, stats
from jentropy.base import Array, Rollouts, require
from jentropy.data.source import Prompts


class ExhaustedError(ValueError):
    """Too few groups vary within the rounds allowed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicSampling:
    """Which groups are kept, and for how long they are looked for.

    Known as `filter_groups.{metric, max_num_gen_batches}` (verl, where 0 is no bound) and `use_dynamic_sampling`
    (NeMo-RL).

    Attributes:
      metric: the reward column of the accuracy, by its name or its place among the task's rewards. Rewards that shape,
        such as `overlong_reward`, are no choice: with them a group of right answers varies.
      max_num_gen_batches: the most rounds per rollout.
      on_exhausted: what is done when they run out: "error", or "pad": the free places are taken by groups of the last
        round that do not vary, with `is_valid` False and no token in the loss mask.

    Reference: DAPO, 2503.14476, eq. 11.
    """

    metric: int | str = 0
    max_num_gen_batches: int = 10
    on_exhausted: str = "error"

    def __post_init__(self) -> None:
        rounds = self.max_num_gen_batches
        require(rounds >= 1, "max_num_gen_batches", rounds, "at least 1")
        require(self.on_exhausted in ("error", "pad"), "on_exhausted", self.on_exhausted, "error or pad")

    def column(self, names: Sequence[str]) -> int:
        """The place of the metric among the task's reward functions, `names`.

        Raises:
          ValueError: there is no such reward, or two of this name.
        """
        if isinstance(self.metric, str):
            unique = list(names).count(self.metric) == 1
            require(unique, "metric", self.metric, f"one of the rewards {list(names)}, given once")
            return list(names).index(self.metric)
        require(0 <= self.metric < len(names), "metric", self.metric, f"below {len(names)}, the number of rewards")
        return self.metric


class Judged(NamedTuple):
    """What is known of the groups of one round.

    Attributes:
      varies: `[P]` bool, whether the metric differs within the group.
      total: scalar, sum of the metric over the rows in which it is valid.
      count: scalar, number of these rows.
    """

    varies: Array
    total: Array
    count: Array


def judge_groups(rollouts: Rollouts, *, column: int, num_groups: int) -> Judged:
    """Which groups have max - min > 0 in one reward column, over the rows in which that reward is valid.

    A group with fewer than two such rows does not vary. One with a NaN does, so that the step sees it.

    Args:
      rollouts: graded rows; groups 0..P-1, rows in any order.
      column: of the accuracy, without shaping.
      num_groups: P.
    """
    chex.assert_rank([rollouts.rewards, rollouts.group], [2, 1])
    score, valid = rollouts.rewards[:, column], outcome.valid_rewards(rollouts)[:, column]
    varies = ~stats.group_is_constant(score, rollouts.group, valid) | (valid & jnp.isnan(score))
    return Judged(
        jnp.zeros(num_groups, bool).at[rollouts.group].max(varies),
        stats.masked_sum(score, valid),
        jnp.sum(valid, dtype=score.dtype),
    )


def place_groups(kept: Rollouts, fresh: Rollouts, source: Array, is_padding: Array) -> Rollouts:
    """Puts groups of one rollout in places of another; pure, for `jax.jit`.

    Row `p * G + g` of both is the g-th of group p. Rows are numbered anew: `row_id` 0..B-1, `group` 0..P-1, and a
    `parent` in the same group goes with it.

    Args:
      kept: B = P * G rows, those of some places to be replaced.
      fresh: rows of the same shapes.
      source: `[P]` int32, for each place the group of `fresh` to put there, -1 to leave what is there.
      is_padding: `[P]` bool, places whose rows become invalid: `is_valid` False, nothing in the loss mask.

    Raises:
      ValueError: P does not divide the rows, or they lack `row_data["is_valid"]`.
    """
    chex.assert_rank([source, is_padding], 1)
    num_rows, num_groups = fresh.row_id.shape[0], source.shape[0]
    if num_rows % num_groups or "is_valid" not in fresh.row_data:
        raise ValueError(f"{num_groups} groups need a multiple of it of rows with is_valid, got {num_rows} rows")
    size = num_rows // num_groups
    row_id = jnp.arange(num_rows, dtype=jnp.int32)
    replaced = jnp.repeat(source >= 0, size)
    row = jnp.where(replaced, jnp.repeat(source, size) * size + row_id % size, row_id)

    def place(old: Array, new: Array) -> Array:
        return jnp.where(replaced.reshape((num_rows, *[1] * (old.ndim - 1))), new[row], old)

    rows = jax.tree.map(place, kept, fresh)
    valid = ~jnp.repeat(is_padding, size)
    return rows.replace(
        row_id=row_id,
        group=row_id // size,
        parent=jnp.where(rows.parent >= 0, rows.parent + row_id - row, -1),
        loss_mask=rows.loss_mask & valid[:, None],
        row_data={**rows.row_data, "is_valid": rows.row_data["is_valid"] & valid},
    )


class Sampled(NamedTuple):
    """A rollout of P groups.

    Attributes:
      rollouts: its rows, groups 0..P-1, rows numbered anew.
      example_id: `[P]`, the prompt of each group.
      metrics: `dynamic/rounds`; `dynamic/num_gen_prompts`, prompts sampled; `dynamic/kept_fraction`, how many of them
        had responses that differ; `dynamic/padded_fraction` of the rollout's groups; `dynamic/score/mean`, the
        accuracy over all valid rows sampled, which that of the rollout is not.
    """

    rollouts: Rollouts
    example_id: np.ndarray
    metrics: Mapping[str, tuple[Any, Any]]


SampleRound: TypeAlias = Callable[[int, Prompts], Rollouts]
"""(round, P prompts) -> graded rows, row `p * G + g` the g-th of prompt p."""


def dynamic_rollouts(
    next_prompts: Callable[[int], Prompts],
    sample_round: SampleRound,
    *,
    settings: DynamicSampling,
    num_groups: int,
    judge: Callable[[Rollouts], Judged],
    place: Callable[[Rollouts, Rollouts, np.ndarray, np.ndarray], Rollouts],
) -> Sampled:
    """Samples rounds until P groups vary; pure given its functions, so equal if they are functions of the round.

    Args:
      next_prompts: the P prompts of a round, 0 for the first.
      sample_round: see `SampleRound`.
      settings: bound and what to do at it.
      num_groups: P.
      judge: a compiled `judge_groups`, its result on the host: all that leaves the device.
      place: a compiled `place_groups` that takes its last two arguments from the host.

    Raises:
      ExhaustedError: fewer than P groups vary in all rounds, and `on_exhausted` is "error".
    """
    rows, example_id = None, np.full(num_groups, -1, np.int64)
    num_taken, num_varying, num_padded, total, count, number = 0, 0, 0, 0.0, 0.0, -1
    while num_taken < num_groups:
        number += 1
        prompts = next_prompts(number)
        fresh = sample_round(number, prompts)
        varies, part_total, part_count = (np.asarray(x) for x in judge(fresh))
        num_varying, total, count = (
            num_varying + int(varies.sum()),
            total + float(part_total),
            count + float(part_count),
        )
        chosen = np.flatnonzero(varies)
        if number + 1 == settings.max_num_gen_batches and num_taken + len(chosen) < num_groups:
            if settings.on_exhausted == "error":
                raise ExhaustedError(_exhausted(number + 1, num_taken + len(chosen), num_groups, settings))
            chosen = np.concatenate([chosen, np.flatnonzero(~varies)])
        chosen = chosen[: num_groups - num_taken]
        places = slice(num_taken, num_taken + len(chosen))
        source, is_padding = np.full(num_groups, -1, np.int32), np.zeros(num_groups, bool)
        source[places], is_padding[places], example_id[places] = chosen, ~varies[chosen], prompts.example_id[chosen]
        rows = place(fresh if rows is None else rows, fresh, source, is_padding)
        num_taken, num_padded = places.stop, int(is_padding.sum())
    assert rows is not None, "there is at least one group"
    sampled = (number + 1) * num_groups
    numbers = {
        "rounds": (number + 1, 1),
        "num_gen_prompts": (sampled, 1),
        "kept_fraction": (num_varying, sampled),
        "padded_fraction": (num_padded, num_groups),
        "score/mean": (total, count),
    }
    metrics = {f"dynamic/{name}": (np.float32(value), np.float32(of)) for name, (value, of) in numbers.items()}
    return Sampled(rows, example_id, metrics)


def _exhausted(rounds: int, kept: int, wanted: int, settings: DynamicSampling) -> str:
    return (
        f"dynamic sampling: in {rounds} rounds of {wanted} prompts the responses of only {kept} differ in reward "
        f"{settings.metric!r}, and {wanted} are wanted; raise max_num_gen_batches = {settings.max_num_gen_batches}, "
        "change the mixture or the size of groups, or fill up with on_exhausted='pad'"
    )
