"""VinePPO's rollouts: what the prompt and the first steps of each response are worth, by sampling from there."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jentropy.base import Array, Rollouts, require
from jentropy.data.source import Prompts
from jentropy.data.steps import step_ids
from jentropy.data.task import Task
from jentropy.rollout.forks import Prefixes
from jentropy.rollout.strategy import Tools


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vine:
    """Values each step's prefix by K responses that go on from it; the rows are the responses to the prompts alone.

    What was sampled to learn the values is not trained on. Prefixes of the same tokens of the same prompt, the bare
    prompt above all, share one value. It is the mean of the total reward, so a response that is cut counts what its
    graders give it (0 in the paper), and 0 if they gave none of the K a reward. Steps are those of
    `Task.step_boundary`; a response without a boundary is one step.

    Attributes:
      num_rollouts: K.
      max_states: states of each response that are valued, from the prompt on; the rest is not known, which `advantages.
        vine` takes from the end. None: all.
      batch: prefixes in one call of the sampler, for each prompt of the rollout: changes memory, not results.

    Reference: 2410.01679; released code: McGill-NLP/VinePPO.
    """

    num_rollouts: int = 9
    max_states: int | None = None
    batch: int = 8

    def __post_init__(self) -> None:
        require(self.num_rollouts >= 1, "num_rollouts", self.num_rollouts, "at least 1")
        states = self.max_states
        require(states is None or states >= 1, "max_states", states, "None or at least 1")
        require(self.batch >= 1, "batch", self.batch, "at least 1")

    @property
    def provides(self) -> tuple[str, ...]:
        """See `Strategy`."""
        return ("step_id", "prefix_value", "prefix_known")

    @property
    def refuses(self) -> tuple[str, ...]:
        """See `Strategy`."""
        return ()

    def num_groups(self, num_prompts: int) -> int:
        """See `Strategy`."""
        return num_prompts

    def num_roots(self, num_generations: int) -> int:
        """See `Strategy`."""
        return num_generations

    def num_continuations(self, num_generations: int) -> int:
        """See `Strategy`."""
        del num_generations
        return self.num_rollouts

    def check(self, num_generations: int, task: Task) -> None:
        """Raises `ValueError` if the task does not say where steps begin."""
        del num_generations
        known = task.step_boundary is not None
        require(known, f"the step_boundary of task {task.name!r}", None, "a rule that says where steps begin")

    def __call__(
        self, roots: Rollouts, entropy: Array, prompts: Prompts, task: Task, tools: Tools
    ) -> tuple[Rollouts, Mapping[str, tuple[Any, Any]]]:
        """See `Strategy`."""
        del entropy
        assert task.step_boundary is not None, "check() was not called"
        names = (roots.tokens, roots.loss_mask, roots.fork, roots.row_data["is_valid"])
        tokens, mask, fork, valid = (np.asarray(x) for x in jax.device_get(names))
        step_id = step_ids(task.step_boundary(tokens, mask), mask)
        states = distinct_states(tokens, step_id, valid, prompts.example_id, self.max_states)
        value, num_tokens = self._values(states, tokens, fork, prompts, tools)
        prefix_value = np.zeros((len(tokens), task.max_new_tokens + 1), np.float32)
        prefix_known = np.zeros(prefix_value.shape, bool)
        prefix_value[states.row, states.step] = value[states.index]
        prefix_known[states.row, states.step] = True
        found = {"step_id": step_id, "prefix_value": prefix_value, "prefix_known": prefix_known}
        metrics = {"num_states": (len(states.first), 1), "num_mc_tokens": (num_tokens, 1)}
        metrics["shared_fraction"] = (len(states.row) - len(states.first), max(len(states.row), 1))
        metrics = {f"rollout/{name}": (np.float32(a), np.float32(b)) for name, (a, b) in metrics.items()}
        return roots.replace(row_data={**roots.row_data, **tools.put(found)}), metrics

    def _values(
        self, states: "States", tokens: np.ndarray, fork: np.ndarray, prompts: Prompts, tools: Tools
    ) -> tuple[np.ndarray, int]:
        """The value of each distinct state, `[U]`, and the tokens that were sampled for it."""
        num_prompts, num_rows = len(prompts.length), len(tokens)
        size, values, num_tokens = self.batch * num_prompts, [], 0
        for start in range(0, len(states.first), size):
            part = states.first[start : start + size]
            padded = np.concatenate([part, np.repeat(part[:1], size - len(part))])
            row = states.row[padded]
            arrays = {
                "tokens": tokens[row], "length": states.column[padded].astype(np.int32), "prompt_length": fork[row],
                "parent": np.full(size, -1, np.int32), "is_valid": np.arange(size) < len(part),
            }  # fmt: skip
            prefixes = Prefixes(**tools.put(arrays))
            owner = row // (num_rows // num_prompts)
            grown = tools.grow(prefixes, owner.astype(np.int32), num_rows + start * self.num_rollouts)
            value, count = _means(grown, self.num_rollouts, tools.weights)
            values.append(value[: len(part)])
            num_tokens += count
        return np.concatenate([np.zeros(0, np.float32), *values]), num_tokens


class States(NamedTuple):
    """The N states that are valued, and which of them are the same.

    Attributes:
      row, step, column: `[N]`: the step of a row before which the state stands, and that step's first column.
      index: `[N]`, of the distinct state.
      first: `[U]`, for each distinct state, in an order of their tokens, one of the N.
    """

    row: np.ndarray
    step: np.ndarray
    column: np.ndarray
    index: np.ndarray
    first: np.ndarray


def distinct_states(
    tokens: np.ndarray, step_id: np.ndarray, valid: np.ndarray, example_id: np.ndarray, max_states: int | None
) -> States:
    """The states before the steps of all valid rows.

    Args:
      tokens: `[B, T]` int32; row `p * G + g` is of prompt p.
      step_id: `[B, T]` int32, -1 outside the response.
      valid: `[B]` bool.
      example_id: `[P]`, of the prompts: different ones have no state in common.
      max_states: of each row; None for all.
    """
    before = np.concatenate([np.full_like(step_id[:, :1], -1), step_id[:, :-1]], axis=1)
    begins = (step_id > before) & valid[:, None]
    if max_states is not None:
        begins &= step_id < max_states
    row, column = np.nonzero(begins)
    prefix = np.where(np.arange(tokens.shape[1])[None, :] < column[:, None], tokens[row], -1)
    example = example_id[row // max(len(tokens) // len(example_id), 1)]
    key = np.concatenate([example[:, None], prefix], axis=1)
    if not len(key):
        return States(row, row, column, row, row)
    _, first, index = np.unique(key, axis=0, return_index=True, return_inverse=True)
    return States(row, step_id[row, column], column, index.reshape(-1), first)


def _means(rows: Rollouts, size: int, weights: np.ndarray) -> tuple[np.ndarray, int]:
    """The mean total reward of each `size` rows, over the valid ones, 0 without one; the tokens of all rows."""
    rewards, valid, mask = (
        np.asarray(x) for x in jax.device_get((rows.rewards, rows.row_data["is_valid"], rows.loss_mask))
    )
    given = np.broadcast_to(valid[:, None], rewards.shape)
    if "reward_is_valid" in rows.row_data:
        given = given & np.asarray(jax.device_get(rows.row_data["reward_is_valid"]))
    total = (np.where(given, rewards, 0.0).astype(np.float64) * weights[None, :]).sum(axis=1)
    count = valid.reshape(-1, size).sum(axis=1)
    value = np.where(valid, total, 0.0).reshape(-1, size).sum(axis=1) / np.maximum(count, 1)
    return value.astype(np.float32), int(mask.sum())
