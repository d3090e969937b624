"""Doing one step of a run again, on the very rollouts that it was given.

A kept step (`Experiment.keep_rollouts`) has its state with it: `replay_kept` does its updates again, by the programs of
training, and the metrics must be those that the run wrote; or it does them with another method.

The state of a quarantined step is not stored with its batch: `replay` asks whether it was the numbers or the machine.
Training is a pure function of (config, step), so the state is made anew: from the newest checkpoint at or before the
step, through the rollouts in between. Their metrics must be those that the run wrote, else the replay says where it
departed.
"""

import functools
import json
import math
from collections.abc import Mapping
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
from jentropy.train.experiment import Experiment, Supervised
from jentropy.train.kept import load_kept, restore_read_only
from jentropy.train.ledger import PREFIX as LEDGER
from jentropy.train.metrics import divide, read_metrics
from jentropy.train.other_method import other_stage, state_under
from jentropy.train.programs import SAMPLING
from jentropy.train.quarantine import SKIPPED, load_batch, stored_steps
from jentropy.train.sharding import make_mesh, replicated, row_sharding
from jentropy.train.state import TrainState
from jentropy.train.step import make_train_step
from jentropy.train.stepper import fresh_state, make_stepper, stage_spec, state_template
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


class _Past:
    """The states that a run has been in."""

    def __init__(self, run: Path, config: fdl.Config) -> None:
        self.run, self.config = run, config
        self.experiment: Experiment = config_lib.build(config)
        self.mesh: Mesh = make_mesh(self.experiment.mesh)
        self.policy: Policy = transformer(self.experiment.policy)
        self.key: Array = jax.device_put(jax.random.key(self.experiment.seed), replicated(self.mesh))

    def stage(self, name: str) -> int:
        """The index of a stage, which is not supervised."""
        for index, stage in enumerate(self.experiment.stages):
            if stage.name == name and not isinstance(stage, Supervised):
                return index
        raise ReplayError(f"the config of {self.run} has no stage {name!r} of reinforcement learning or preferences")

    def _restore(self, step: int, index: int) -> TrainState:
        template = state_template(self.experiment, self.policy, self.mesh, index)
        return restore_read_only(self.run / "checkpoints", step, template)

    def before(self, index: int, step: int) -> tuple[TrainState, int]:
        """A state of the stage at or before rollout `step`, the newest there is, and the rollouts it has seen."""
        saved = {s: m for s, m in checkpoint_metadata(self.run).items() if s <= step}
        here = [s for s, m in saved.items() if m.get("stage") == index]
        if here:
            return self._restore(here[-1], index), here[-1]
        params, start = self._params_of(index, saved)
        shardings = jax.tree.map(lambda x: x.sharding, state_template(self.experiment, self.policy, self.mesh, index))
        fresh = functools.partial(fresh_state, self.experiment, index)
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
        if not isinstance(last, Supervised) and ends:
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


_OF_LINES = ("stage", "step")
"""What a line of metrics says besides numbers."""


def differences(found: Mapping[str, Any], recorded: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Where a step done again departs from the line a run wrote: `(recorded, found)` by key, None for a missing one.

    Numbers are compared bit by bit; NaN equals NaN. A step that is given its rollout does not know what sampling said
    of itself: such keys are left out.
    """
    keys = {name for name in found.keys() | recorded.keys() if name not in _OF_LINES}
    keys -= set(_of_sampling(found, recorded))
    pairs = {name: (recorded.get(name), found.get(name)) for name in sorted(keys)}
    return {name: (a, b) for name, (a, b) in pairs.items() if not (a == b or (_is_nan(a) and _is_nan(b)))}


def _of_sampling(found: Mapping[str, Any], recorded: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in recorded.keys() - found.keys() if name.startswith(filters.METRICS))


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _same(found: Mapping[str, Any], recorded: Mapping[str, Any] | None) -> bool:
    """Whether a line of metrics holds these numbers; the ledger has a file of its own."""
    found = {name: value for name, value in found.items() if not name.startswith(LEDGER)}
    return recorded is not None and not differences(found, recorded)


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
    assert not isinstance(stage, Supervised)
    state, start = past.before(index, step)
    lines = {line["step"]: line for line in read_metrics(run / "metrics.jsonl") if SKIPPED in line}
    departed: list[int] = []

    def check(at: int, metrics: Metrics) -> float:
        found = divide(jax.device_get(metrics))
        if not _same(found, lines.get(at)):
            departed.append(at)
        return found[SKIPPED]

    stepper = make_stepper(past.experiment, stage, past.policy, past.mesh, jax.random.fold_in(past.key, SAMPLING))
    for at in range(start, step):
        state, metrics = stepper(state, at)[:2]
        check(at, metrics)
    _, metrics = stepper.train_step(state, jax.device_put(batch.rollouts, row_sharding(past.mesh)))
    skipped = check(step, metrics)
    return Replay(step, start, min(departed, default=None), float(description.get(SKIPPED, math.nan)), skipped)


class KeptReplay(NamedTuple):
    """A kept step done again.

    Attributes:
      step: the rollout's number.
      stage: name of its stage.
      method: name of the other config, None for the run's own.
      recorded: metrics that the run wrote, those of the ledger included.
      found: metrics now.
    """

    step: int
    stage: str
    method: str | None
    recorded: Mapping[str, float]
    found: Mapping[str, float]

    @property
    def differs(self) -> dict[str, tuple[Any, Any]]:
        """`(the run's, now)` of each metric that is not the same bit by bit."""
        return differences(self.found, self.recorded)

    @property
    def exit_code(self) -> int:
        """1 for a step of the run's own method that is not what it was, else 0."""
        return int(self.method is None and bool(self.differs))

    def text(self) -> str:
        """The finding as lines; under another method a table of all metrics."""
        title = f"step {self.step} of stage {self.stage!r}"
        if self.method is not None:
            names = sorted(self.found.keys() | self.recorded.keys())
            rows = [(name, self.recorded.get(name), self.found.get(name)) for name in names]
            return f"{title} under {self.method}, from the same state and rollout\n{_table(rows, '{:.6g}')}"
        unknown, differs = _of_sampling(self.found, self.recorded), self.differs
        left_out = f"; of sampling, not done again: {', '.join(unknown)}" if unknown else ""
        if not differs:
            return f"{title}: equal in all {len(self.found)} keys{left_out}"
        count = len(self.found.keys() | self.recorded.keys()) - len(unknown)
        rows = [(name, *values) for name, values in differs.items()]
        return f"{title}: {len(differs)} of {count} keys differ{left_out}\n{_table(rows, '{!r}')}"


def _table(rows: list[tuple[str, Any, Any]], style: str) -> str:
    cells = [(name, *("-" if value is None else style.format(value) for value in pair)) for name, *pair in rows]
    cells = [("metric", "run", "replayed"), *cells]
    name, one, other = (max(len(row[i]) for row in cells) for i in range(3))
    return "\n".join(f"{a:<{name}}  {b:>{one}}  {c:>{other}}" for a, b, c in cells)


def recorded_line(run: str | Path, step: int) -> dict[str, float]:
    """The metrics that a run wrote of a rollout, those of the ledger included.

    Raises:
      ReplayError: none are there.
    """
    lines = [line for line in read_metrics(Path(run) / "metrics.jsonl") if SKIPPED in line and line["step"] == step]
    if not lines:
        raise ReplayError(f"{Path(run) / 'metrics.jsonl'} has no line of rollout {step}")
    ledger = [line for line in read_metrics(Path(run) / "ledger.jsonl") if line["step"] == step]
    merged = {name: value for line in (*lines, *ledger) for name, value in line.items()}
    return {name: value for name, value in merged.items() if name not in _OF_LINES}


def replay_kept(run: str | Path, step: int, config: fdl.Config | None = None) -> KeptReplay:
    """Does the updates of a kept step again, from its state and on its rollout; nothing in the folder is changed.

    On the devices and with the versions of the run its line in `metrics.jsonl` comes out bit for bit.

    Args:
      run: the run's folder.
      step: the rollout's number.
      config: another config, whose method is used instead, see `other_method`; or the run's own, if that uses functions
        that are not jentropy's.

    Raises:
      ReplayError: the run wrote no metrics of the step.
      FileNotFoundError, KeptError, CorruptCheckpointError, ConfigError: see `load_kept` and `other_stage`.
    """
    run = Path(run)
    own = config is None or is_own(run, config)
    kept = load_kept(run, step, config if own else None)
    recorded = recorded_line(run, step)
    if config is None or own:
        method, stage, state = None, kept.stage, kept.state
    else:
        method, stage = config.name, other_stage(kept, config)
        state = state_under(kept, stage)
    train_step = make_train_step(stage_spec(kept.experiment, stage, kept.policy), stage.num_groups, kept.mesh)
    _, metrics = train_step(state, kept.placed())
    return KeptReplay(step, stage.name, method, recorded, divide(jax.device_get(metrics)))


def is_own(run: str | Path, config: fdl.Config) -> bool:
    """Whether a config is the one that a run was begun or last resumed with."""
    path = Path(run) / "config.txt"
    return path.is_file() and config_lib.read_lines(path) == config_lib.flatten(config)
