"""Strategies: how the rows of a rollout come from the first responses to its prompts.

Without a strategy the responses are the rows. With one, they are roots: more rows are sampled from prefixes of them, to
train on, or to learn what the prefixes are worth. A strategy is a frozen dataclass of numbers. It runs on the host and
is given what it needs to sample and to compute, so its result is a function of the roots and of these.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jentropy.base import Array, Metrics, Rollouts
from jentropy.data.source import Prompts
from jentropy.data.task import Task
from jentropy.rollout.forks import Prefixes

PADDED = "rollout/padded_fraction"
"""The metric of how many rows of a rollout are padding: no token in the loss mask, and not valid."""


class Tools(NamedTuple):
    """What a strategy is given, for one rollout; all of it compiled once per stage.

    Attributes:
      grow: `(prefixes of S states, prompt of each [S] on the host, first row_id) -> rows`, `S * K` of them, graded; see
        `forks.continued_rollouts`. S is the same in every call.
      run: `(function, static, *arrays) -> function(static, *arrays)`, which is a pair: a tree of arrays by rows, and a
        tree of scalars. `function` is of a module, `static` hashable.
      score: the trainer's log-probabilities `[B, T]` of the tokens in a loss mask.
      put: arrays by rows from the host onto the devices.
      key, index: the randomness of a rollout is `fold_in(key, index)`, that of a row `fold_in(_, row_id)`.
      weights: `[R]`, of the reward columns in the estimator's total reward.
      num_generations: rows of a group.
    """

    grow: Callable[[Prefixes, np.ndarray, int], Rollouts]
    run: Callable[..., tuple[Any, Any]]
    score: Callable[[Rollouts], Array]
    put: Callable[[Any], Any]
    key: Array
    index: Array
    weights: np.ndarray
    num_generations: int


class Strategy(Protocol):
    """See above. Hashable, so that equal strategies share their programs.

    A rollout has `num_groups(P)` groups of `num_generations` rows each, a multiple of P; rows that could not be made
    are padding: `row_data["is_valid"]` False, nothing in the loss mask. What it says of itself has names that begin
    with `rollout/`; see `PADDED`.
    """

    @property
    def provides(self) -> tuple[str, ...]:
        """Entries of `row_data` that its rows hold besides those that all rows can."""
        ...

    @property
    def refuses(self) -> tuple[str, ...]:
        """Entries that its rows cannot hold."""
        ...

    def num_groups(self, num_prompts: int) -> int:
        """Groups of a rollout of P prompts."""
        ...

    def num_roots(self, num_generations: int) -> int:
        """Responses to each prompt that are sampled first."""
        ...

    def num_continuations(self, num_generations: int) -> int:
        """Rows that are sampled from each prefix, K."""
        ...

    def check(self, num_generations: int, task: Task) -> None:
        """Raises `ValueError` if it cannot work with groups of this size, or on this task."""
        ...

    def __call__(self, roots: Rollouts, entropy: Array, prompts: Prompts, task: Task, tools: Tools) -> Any:
        """The rows of a rollout, and metrics: a pair.

        Args:
          roots: graded, row `p * num_roots + g` the g-th response to prompt p.
          entropy: `[B, T]`, of each sampled token, nats.
          prompts: on the host.
          task: its rules for text.
          tools: see `Tools`.
        """
        ...


def join(num_groups: int, roots: Rollouts, grown: Rollouts) -> tuple[Rollouts, Metrics]:
    """Roots and the rows that grew from them as one rollout, and how many of these are padding.

    Args:
      num_groups: of the roots; those of the other rows are numbered after them.
      roots: rows without a `prefix_length`.
      grown: of `forks.continued_rollouts`; `row_id` must differ from those of the roots.
    """
    roots = roots.replace(row_data={**roots.row_data, "prefix_length": jnp.zeros_like(roots.row_id)})
    grown = grown.replace(group=grown.group + num_groups)
    return concatenate(roots, grown)


def concatenate(one: Rollouts, other: Rollouts) -> tuple[Rollouts, Metrics]:
    """The rows of both, which hold the same data, and `PADDED`."""
    merged = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), one, other)
    empty = jnp.sum(~jnp.any(merged.loss_mask, axis=1), dtype=jnp.float32)
    return merged, {PADDED: (empty, jnp.float32(merged.row_id.shape[0]))}
