"""Doing one step of a run again, on the very rollouts that it was given: was it the numbers, or the machine?

A step's state is not stored with its batch. Training is a pure function of (config, step), so the state is made anew:
from the newest checkpoint at or before the step, through the rollouts in between, by the programs of training. Their
metrics must be those that the run wrote, else the replay says where it departed.
"""

import contextlib
import functools
import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import fiddle as fdl
import jax
import numpy as np
from jax.sharding import Mesh

from jentropy import config as config_lib
from jentropy.base import Array, Metrics, Policy
from jentropy.policy.transformer import transformer
from jentropy.train import filters
from jentropy.train.checkpoint import Checkpoints
from jentropy.train.experiment import Experiment, Reinforce, Supervised
from jentropy.train.metrics import divide, read_metrics
from jentropy.train.programs import SAMPLING
from jentropy.train.quarantine import SKIPPED, load_batch, stored_steps
from jentropy.train.sharding import make_mesh, replicated, row_sharding
from jentropy.train.state import TrainState, new_stage
from jentropy.train.stepper import Stepper, state_template
from jentropy.train.warm_start import cached_warm_start, init_params, run_supervised


class ReplayError(ValueError):
    """A step that cannot be done again; the message says what is missing."""


class Replay(NamedTuple):
    """What came of a replay.

    Attributes:
      step: the rollout's number.
      start: the number of the rollout from which the state was made anew.
      departed: the first rollout whose metrics are not those the run wrote, None if all are the same.
      recorded: the fraction of the step's updates that the run skipped.
      skipped: the fraction that is skipped now.
    """

    step: int
    start: int
    departed: int | None
    recorded: float
    skipped: float

    @property
    def non_finite(self) -> bool:
        """Whether numbers are not finite again."""
        return self.skipped > 0

    def text(self) -> str:
        """The finding in a sentence or two."""
        shares = f"{self.skipped:.0%} of its updates are skipped, {self.recorded:.0%} in the run"
        again = (
            f"not finite again ({shares}): state and batch explain it"
            if self.non_finite
            else "finite now: state and batch do not explain it, the machine or its load may"
        )
        same = (
            "and every metric is the one the run wrote"
            if self.departed is None
            else f"but from rollout {self.departed} on the metrics are not those the run wrote, so the state differs"
        )
        return f"step {self.step}, replayed from step {self.start}: {again}, {same}"


def checkpoint_metadata(run: Path) -> dict[int, dict[str, Any]]:
    """The metadata of every checkpoint of a run by step, ascending, read without Orbax: nothing is touched.

    A step whose metadata is no JSON object has an empty one.
    """
    found = {}
    for folder in (run / "checkpoints").glob("*"):
        if folder.name.isdecimal() and folder.is_dir():
            try:
                metadata = json.loads((folder / "metadata" / "metadata").read_bytes())
            except (OSError, ValueError):
                metadata = {}
            found[int(folder.name)] = metadata if isinstance(metadata, dict) else {}
    return dict(sorted(found.items()))


@contextlib.contextmanager
def _read_only(run: Path, step: int) -> Iterator[Checkpoints]:
    """The one checkpoint, in a folder of its own: opening that of a run would clean up after a save in progress."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / str(step)).symlink_to((run / "checkpoints" / str(step)).resolve(), target_is_directory=True)
        with Checkpoints(folder, max_to_keep=None) as checkpoints:
            yield checkpoints


class _Past:
    """The states that a run has been in."""

    def __init__(self, run: Path, config: fdl.Config) -> None:
        self.run, self.config = run, config
        self.experiment: Experiment = config_lib.build(config)
        self.mesh: Mesh = make_mesh(self.experiment.mesh)
        self.policy: Policy = transformer(self.experiment.policy)
        self.key: Array = jax.device_put(jax.random.key(self.experiment.seed), replicated(self.mesh))

    def stage(self, name: str) -> int:
        """The index of a stage of reinforcement learning."""
        for index, stage in enumerate(self.experiment.stages):
            if stage.name == name and isinstance(stage, Reinforce):
                return index
        raise ReplayError(f"the config of {self.run} has no stage {name!r} of reinforcement learning")

    def _restore(self, step: int, index: int) -> TrainState:
        with _read_only(self.run, step) as checkpoints:
            return checkpoints.restore(step, state_template(self.experiment, self.policy, self.mesh, index))[0]

    def before(self, index: int, step: int) -> tuple[TrainState, int]:
        """A state of the stage at or before rollout `step`, the newest there is, and the rollouts it has seen."""
        saved = {s: m for s, m in checkpoint_metadata(self.run).items() if s <= step}
        here = [s for s, m in saved.items() if m.get("stage") == index]
        if here:
            return self._restore(here[-1], index), here[-1]
        params, start = self._params_of(index, saved)
        stage = self.experiment.stages[index]
        assert isinstance(stage, Reinforce)
        shardings = jax.tree.map(lambda x: x.sharding, state_template(self.experiment, self.policy, self.mesh, index))
        fresh = functools.partial(
            new_stage, objective=stage.objective, optimizer=stage.optimizer, reference=stage.reference,
            sampler=stage.sampler, reward_weights=self.experiment.reward_weights(stage),
        )  # fmt: skip
        count = jax.device_put(np.int32(start), replicated(self.mesh))
        return jax.jit(fresh, out_shardings=shardings)(params, count, self.key), start

    def _params_of(self, index: int, saved: Mapping[int, Mapping[str, Any]]) -> tuple[Any, int]:
        """The parameters that a stage started from, and the rollouts before it."""
        stages = self.experiment.stages
        if index == 0:
            return init_params(self.policy, self.experiment.seed, self.mesh), 0
        first, last = stages[0], stages[index - 1]
        if index == 1 and isinstance(first, Supervised):
            return self._warm_start(first), 0
        ends = [s for s, m in saved.items() if (m.get("stage"), m.get("stage_step")) == (index - 1, last.steps)]
        if isinstance(last, Reinforce) and ends:
            return self._restore(ends[-1], index - 1).params, ends[-1]
        raise ReplayError(
            f"{self.run} has no checkpoint at or before this step from which stage {stages[index].name!r} can be "
            f"replayed; checkpoints before it: {list(saved) or 'none'}"
        )

    def _warm_start(self, stage: Supervised) -> Any:
        def train() -> Any:
            start = init_params(self.policy, stage.seed, self.mesh)
            return run_supervised(stage, self.policy, self.experiment.task, start, self.mesh, lambda step, loss: None)

        return cached_warm_start(self.config, self.policy, self.mesh, train)[0]


def _same(found: Mapping[str, Any], recorded: Mapping[str, Any] | None) -> bool:
    """Whether a line of metrics holds these numbers, bit by bit; NaN equals NaN.

    A step that is given its rollout does not know what sampling said of itself.
    """
    if recorded is None:
        return False
    unknown = {name for name in recorded.keys() - found.keys() if name.startswith(filters.METRICS)}
    if found.keys() != recorded.keys() - {"stage", "step"} - unknown:
        return False
    pairs = ((value, recorded[name]) for name, value in found.items())
    return all(a == b or (isinstance(b, float) and math.isnan(a) and math.isnan(b)) for a, b in pairs)


def replay(run: str | Path, step: int | None = None, config: fdl.Config | None = None) -> Replay:
    """Does a quarantined step of a run again, with the programs of training.

    Args:
      run: the run's folder; nothing in it is changed.
      step: of the batch; None for the newest that is stored.
      config: the run's config, if it uses functions that are not jentropy's; else that in the folder.

    Raises:
      ReplayError: nothing is stored, or no checkpoint leads there.
      QuarantineError: the stored batch is damaged.
      CheckpointError: the checkpoint cannot be read.
    """
    run = Path(run)
    stored = stored_steps(run / "quarantine")
    if step is None and not stored:
        raise ReplayError(f"{run} has no quarantined batch")
    step = stored[-1] if step is None else step
    batch, description = load_batch(run / "quarantine", step)
    past = _Past(run, config or config_lib.load(run / "config.json"))
    index = past.stage(str(description.get("stage")))
    stage = past.experiment.stages[index]
    assert isinstance(stage, Reinforce)
    state, start = past.before(index, step)
    lines = {line["step"]: line for line in read_metrics(run / "metrics.jsonl") if SKIPPED in line}
    departed: list[int] = []

    def check(at: int, metrics: Metrics) -> float:
        found = divide(jax.device_get(metrics))
        if not _same(found, lines.get(at)):
            departed.append(at)
        return found[SKIPPED]

    stepper = Stepper(past.experiment, stage, past.policy, past.mesh, jax.random.fold_in(past.key, SAMPLING))
    for at in range(start, step):
        state, metrics = stepper(state, at)[:2]
        check(at, metrics)
    _, metrics = stepper.train_step(state, jax.device_put(batch.rollouts, row_sharding(past.mesh)))
    skipped = check(step, metrics)
    return Replay(step, start, min(departed, default=None), float(description.get(SKIPPED, math.nan)), skipped)
