"""A kept step under another method: what of the stage and of the state is the run's, and what the other config's."""

import dataclasses
from typing import Any

import fiddle as fdl
import jax
import numpy as np

from jentropy import config as config_lib
from jentropy.train.experiment import Experiment, Reinforce
from jentropy.train.kept import Kept, KeptError
from jentropy.train.optimizer import set_learning_rate
from jentropy.train.state import TrainState, state_shardings

TAKEN = (
    "objective", "optimizer", "num_minibatches", "num_epochs", "num_microbatches", "eos_in_loss", "reference",
)  # fmt: skip
"""Fields of a stage that are the other config's; all others are the run's, since the rollout is."""


def other_stage(kept: Kept, config: fdl.Config) -> Reinforce:
    """The step's stage with the method of another config: its fields `TAKEN`.

    They are those of the config's stage of the same name, else of the stage at the same place, else of its only one of
    reinforcement learning.

    Raises:
      KeptError: the config has no such stage, or the method does not fit the rollout: another temperature, groups that
        are too small or do not divide, or rows that lack what it requires.
      ConfigError: the config builds no experiment.
    """
    experiment: Experiment = config_lib.build(config)
    other, name = _find(kept, experiment), experiment.name
    run = kept.stage
    sampled, wanted = run.objective.temperature, other.objective.temperature
    if sampled != wanted:
        raise KeptError(f"{name}: its temperature is {wanted:g}, and step {kept.step} was sampled at {sampled:g}")
    if other.reference and not run.reference:
        raise KeptError(
            f"{name}: it needs ref_log_prob, which step {kept.step} does not hold: the state has no reference policy, "
            f"because stage {run.name!r} of the run has reference=False"
        )
    held = {*kept.rollouts.row_data, *kept.rollouts.token_data, *(["ref_log_prob"] if run.reference else [])}
    held |= {name for model in run.learners.values() for name in model.provides}
    missing = sorted(other.required - held)
    if missing:
        raise KeptError(
            f"{name}: it needs {', '.join(missing)}, which the rollout of step {kept.step} does not hold; it holds "
            f"{', '.join(sorted(held))}"
        )
    try:
        return dataclasses.replace(run, **{field: getattr(other, field) for field in TAKEN})
    except ValueError as error:
        raise KeptError(f"{name} does not fit the rollout of step {kept.step}: {error}") from error


def _find(kept: Kept, experiment: Experiment) -> Reinforce:
    stages = [stage for stage in experiment.stages if isinstance(stage, Reinforce)]
    found = [stage for stage in stages if stage.name == kept.stage.name]
    if not found and kept.index < len(experiment.stages):
        at = experiment.stages[kept.index]
        found = [at] if isinstance(at, Reinforce) else []
    found = found or (stages if len(stages) == 1 else [])
    if not found:
        names = ", ".join(repr(stage.name) for stage in stages) or "none"
        raise KeptError(
            f"{experiment.name}: no stage {kept.stage.name!r} like that of step {kept.step}; of reinforcement "
            f"learning it has {names}"
        )
    return found[0]


def state_under(kept: Kept, stage: Reinforce) -> TrainState:
    """The kept state for the method of `stage`, as `other_stage` returns it; its buffers are partly those of `kept`.

    Parameters and the optimizer's moments are the run's, the learning rate is the stage's. Of a chain, a mechanism goes
    on from its state if the run has one of the same name, kind and numbers, else it begins afresh; so does the
    estimator.
    """
    run, state = kept.stage, kept.state
    weights = kept.experiment.reward_weights(run)
    mechanisms = (objective.mechanisms.init() for objective in (run.objective, stage.objective))
    estimators = (objective.estimator.init(weights) for objective in (run.objective, stage.objective))
    state = state.replace(
        opt_state=set_learning_rate(stage.optimizer, state.opt_state),
        mechanism_state=_carried(state.mechanism_state, *mechanisms),
        estimator_state=_carried(state.estimator_state, *estimators),
        frozen=state.frozen if stage.reference else {},
    )
    return jax.device_put(state, state_shardings(kept.policy, kept.mesh, stage.optimizer, state))


def _carried(kept: Any, before: Any, fresh: Any) -> Any:
    """`kept` if states that start as `before` and as `fresh` start alike, else `fresh`; of a chain by name."""
    if isinstance(fresh, dict) and isinstance(before, dict):
        return {
            name: _carried(kept[name], before[name], part) if name in before else part for name, part in fresh.items()
        }
    return kept if _equal(before, fresh) else fresh


def _equal(a: Any, b: Any) -> bool:
    """Whether two trees have the same structure and the same arrays."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(*map(jax.tree.leaves, jax.device_get((a, b))), strict=True)
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)
