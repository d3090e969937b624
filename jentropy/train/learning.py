"""When second models speak and learn within a step."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax

from jentropy.base import Array, Learner, Metrics, Rollouts
from jentropy.train.state import TrainState

LEARNING = 3
"""What of the run's key is folded in for the updates of second models; see also `programs`, `state` and `step`."""

Learners: TypeAlias = tuple[tuple[str, Learner], ...]
"""By name, in the order in which they speak."""


def _started(key: Array, params: Any) -> Any:
    raise ValueError("a compiled step does not begin a learner")


def compiled_learners(learners: Mapping[str, Learner]) -> Learners:
    """What of second models is compiled into a step: not how they begin, on which their numbers depend."""
    return tuple((name, learner._replace(init=_started)) for name, learner in learners.items())


def learn(
    learners: Learners, state: TrainState, learned: Mapping[str, Any], rows: Rollouts, *, first: bool
) -> tuple[dict[str, Any], Metrics]:
    """Updates the second models whose update comes first, or the others.

    Args:
      learners: of the stage.
      state: of the run, before the step.
      learned: the states of all second models.
      rows: of the rollout.
      first: which of them.

    Returns:
      The states of all; metrics of those that were updated.
    """
    found, metrics = dict(learned), {}
    for i, (name, learner) in enumerate(learners):
        if learner.update_first == first:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(state.key, LEARNING), state.step), i)
            found[name], reported = learner.update(found[name], rows, key)
            metrics |= reported
    return found, metrics


def annotate(learners: Learners, state: TrainState, rows: Rollouts) -> tuple[Rollouts, dict[str, Any], Metrics]:
    """What second models say of the rows of a rollout, whose `logp_old` is the trainer's own score.

    Returns:
      The rows with `token_data` added; the states of all; metrics of those whose update comes first.
    """
    learned, metrics = learn(learners, state, state.learners, rows, first=True)
    for name, learner in learners:
        rows = rows.replace(token_data={**rows.token_data, **learner.annotate(learned[name], rows)})
    return rows, learned, metrics
