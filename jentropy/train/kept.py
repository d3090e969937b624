"""Rollouts of chosen steps, kept with the state that the step began from: for replay, what-if and a closer look.

`Experiment.keep_rollouts` names the steps. Below `RUN/rollouts/` a step has three parts: `step-00000012.safetensors`
holds the arrays as the step took them, `step-00000012.json` what they are (stage, seed, ids, the prompts' places in
their source, names of the reward columns, checksum of the arrays), and `states/12` is a checkpoint of the state before
the step's updates. The JSON is written last, so a step is there as a whole or not at all, and equal rollouts are equal
bytes. Nothing is pickled.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import fiddle as fdl
import jax
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from jentropy import config as config_lib
from jentropy.base import Policy, Rollouts
from jentropy.policy.transformer import transformer
from jentropy.train import manifest
from jentropy.train.checkpoint import CheckpointError, Checkpoints, CorruptCheckpointError
from jentropy.train.compilations import num_compilations
from jentropy.train.experiment import Experiment, Reinforce
from jentropy.train.quarantine import Batch, flatten, stored_steps, unflatten, write_whole
from jentropy.train.sharding import make_mesh, row_sharding
from jentropy.train.state import TrainState
from jentropy.train.stepper import state_template

FOLDER = "rollouts"
"""Of a run's folder."""


class KeptError(ValueError):
    """A step whose rollout is not kept; the message names the folder and the steps that are."""

    exit_code = 2


class DamagedKeptError(KeptError):
    """Files that are not what was written; the message names the file."""

    exit_code = 65


class Kept(NamedTuple):
    """A kept step.

    Attributes:
      step: the rollout's number.
      rollouts: B rows on the host, as the step took them.
      example_id: `[P]` int64, the prompts' places in their source.
      state: the training state before the step's updates, on the devices.
      description: what the JSON file says.
      index: of the stage among the experiment's.
      experiment: the run, as its config builds it.
      policy: the model.
      mesh: devices.
    """

    step: int
    rollouts: Rollouts
    example_id: np.ndarray
    state: TrainState
    description: Mapping[str, Any]
    index: int
    experiment: Experiment
    policy: Policy
    mesh: Mesh

    @property
    def stage(self) -> Reinforce:
        """The step's stage."""
        return reinforce_stage(self.experiment, self.index)

    def placed(self) -> Rollouts:
        """The rollouts on the devices, as the step takes them."""
        return jax.device_put(self.rollouts, row_sharding(self.mesh))


def reinforce_stage(experiment: Experiment, index: int) -> Reinforce:
    """The stage at `index`.

    Raises:
      KeptError: the experiment has no stage of reinforcement learning there.
    """
    stages = experiment.stages
    if not 0 <= index < len(stages) or not isinstance(stages[index], Reinforce):
        raise KeptError(f"stage {index} of {experiment.name!r} is not one of reinforcement learning")
    stage = stages[index]
    assert isinstance(stage, Reinforce)
    return stage


class KeptWriter:
    """Keeps the steps of one run that its config names.

    Args:
      run: the run's folder; `rollouts` is created in it with the first kept step.
      experiment: the run.
      identity: of the config, for the manifests of the states.
      resume_step: the first rollout that the run will make; what is there of it and of later ones is deleted.
    """

    def __init__(self, run: str | Path, experiment: Experiment, *, identity: str, resume_step: int = 0) -> None:
        self.folder, self._experiment, self._identity = Path(run) / FOLDER, experiment, identity
        for path in _paths_from(self.folder, resume_step):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def is_due(self, step: int) -> bool:
        """Whether the rollout number `step` is to be kept."""
        return step in self._experiment.keep_rollouts

    def save_state(self, step: int, index: int, stage_step: int, state: TrainState) -> int:
        """Keeps the state before the updates of a step, which donate it; returns how many programs this compiled.

        Args:
          step: the rollout's number.
          index: of its stage.
          stage_step: the rollout's number in the stage.
          state: before the step.

        Raises:
          CheckpointError: it cannot be written.
        """
        before = num_compilations()
        metadata = {"stage": index, "stage_step": stage_step, "step": step}
        with Checkpoints(self.folder / "states", max_to_keep=None, identity=self._identity) as states:
            states.save(step, state, metadata)
        return num_compilations() - before

    def save_rollouts(self, step: int, index: int, batch: Batch) -> None:
        """Keeps what the step was given; after `save_state`.

        Raises:
          OSError: it cannot be written.
        """
        stage = reinforce_stage(self._experiment, index)
        what = {
            "step": step, "stage": stage.name, "stage_index": index, "seed": self._experiment.seed,
            "rewards": [reward.name for reward in (*self._experiment.task.rewards, *stage.shaping)],
        }  # fmt: skip
        save_rollouts(self.folder, batch, what)


def _paths(folder: Path, step: int) -> tuple[Path, Path]:
    """The files of a rollout: arrays, description."""
    return folder / f"step-{step:08d}.safetensors", folder / f"step-{step:08d}.json"


def _paths_from(folder: Path, step: int) -> list[Path]:
    """All there is of kept steps from `step` on, in the order in which it may be deleted."""
    found = []
    for path in (*folder.glob("step-*.json"), *folder.glob("step-*.safetensors"), *folder.glob("states/*")):
        number = path.name.split(".")[0].removeprefix("step-")
        if number.isdecimal() and int(number) >= step:
            found.append(path)
    return found


def save_rollouts(folder: str | Path, batch: Batch, what: Mapping[str, Any]) -> None:
    """Writes rollouts; those of the same step are replaced.

    Args:
      folder: created if missing.
      batch: on the devices or the host.
      what: JSON values by name; `step` among them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = flatten(batch.rollouts)
    # The types of ml_dtypes (bfloat16) are stored as integers of their size, and named in the JSON.
    plain = {name: a.view(f"u{a.itemsize}") if a.dtype.kind == "V" else a for name, a in arrays.items()}
    content = safetensors.save({name: np.ascontiguousarray(a) for name, a in plain.items()})
    description = {
        **what,
        "example_id": np.asarray(batch.example_id).tolist(),
        "row_id": arrays["row_id"].tolist(),
        "dtypes": {name: array.dtype.name for name, array in arrays.items()},
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    arrays_path, description_path = _paths(folder, what["step"])
    write_whole(arrays_path, content)
    write_whole(description_path, json.dumps(description, sort_keys=True).encode() + b"\n")


def kept_steps(run: str | Path) -> list[int]:
    """The steps that a run has kept, ascending."""
    return stored_steps(Path(run) / FOLDER)


def load_rollouts(run: str | Path, step: int) -> tuple[Batch, dict[str, Any]]:
    """The rollouts of a kept step, on the host, and their description.

    Raises:
      KeptError: the step is not kept.
      DamagedKeptError: files that are not what was written.
    """
    arrays_path, path = _paths(Path(run) / FOLDER, step)
    if not path.is_file():
        steps = ", ".join(map(str, kept_steps(run))) or "none; `keep_rollouts` of the config names them"
        raise KeptError(f"{path}: no rollout of step {step} is kept; steps there: {steps}")
    try:
        description = json.loads(path.read_bytes())
    except ValueError as error:
        raise DamagedKeptError(f"{path} is damaged: {error}") from error
    if not isinstance(description, dict) or description.get("step") != step:
        raise DamagedKeptError(f"{path} is damaged: it does not describe step {step}")
    if not arrays_path.is_file():
        raise DamagedKeptError(f"{arrays_path} is missing")
    content = arrays_path.read_bytes()
    if hashlib.sha256(content).hexdigest() != description.get("sha256"):
        raise DamagedKeptError(f"{arrays_path} is damaged: its checksum is not the one in {path.name}")
    try:
        stored = safetensors.load(content)
        rollouts = unflatten({name: stored[name].view(dtype) for name, dtype in description["dtypes"].items()})
        return Batch(rollouts, np.asarray(description["example_id"], np.int64)), description
    except (AttributeError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise DamagedKeptError(f"{path} is damaged: {error!r}") from error


def restore_read_only(folder: str | Path, step: int, template: TrainState) -> TrainState:
    """The state of a checkpoint; nothing in its folder is touched, so a run may be writing to it.

    It is opened in a folder of its own: opening that of a run would clean up after a save in progress.

    Args:
      folder: of the checkpoints.
      step: of the checkpoint.
      template: see `Checkpoints.restore`.

    Raises:
      CheckpointError: there is none, or its leaves are not those of the template.
      CorruptCheckpointError: files that are not as they were written.
    """
    path = (Path(folder) / str(step)).resolve()
    if not path.is_dir():
        raise CorruptCheckpointError(f"{path} is missing")
    problems = manifest.verify(path)
    if problems:
        raise CorruptCheckpointError(f"{path} is damaged: {'; '.join(problems[:3])}")
    with tempfile.TemporaryDirectory() as name:
        own = Path(name).resolve()
        (own / str(step)).symlink_to(path, target_is_directory=True)
        try:
            with Checkpoints(own, max_to_keep=None) as checkpoints:
                return checkpoints.restore(step, template)[0]
        except CheckpointError as error:
            raise type(error)(str(error).replace(str(own), str(path.parent))) from error


def load_kept(run: str | Path, step: int, config: fdl.Config | None = None) -> Kept:
    """A kept step of a run: its rollouts, and the state that its updates began from.

    Args:
      run: the run's folder; nothing in it is changed.
      step: the rollout's number.
      config: the run's config, if it uses functions that are not jentropy's; else that in the folder.

    Raises:
      FileNotFoundError: no run in the folder.
      KeptError: the step is not kept.
      DamagedKeptError, CorruptCheckpointError: files that are not what was written.
      ConfigError: the run's config names functions of other modules, and none is given.
    """
    run = Path(run)
    if not (run / "config.json").is_file():
        raise FileNotFoundError(f"{run} holds no run: no config.json")
    batch, description = load_rollouts(run, step)
    experiment: Experiment = config_lib.build(config or config_lib.load(run / "config.json"))
    mesh, policy = make_mesh(experiment.mesh), transformer(experiment.policy)
    index = description.get("stage_index")
    if not isinstance(index, int):
        raise DamagedKeptError(f"{_paths(run / FOLDER, step)[1]} is damaged: it names no stage")
    reinforce_stage(experiment, index)
    template = state_template(experiment, policy, mesh, index)
    state = restore_read_only(run / FOLDER / "states", step, template)
    return Kept(step, batch.rollouts, batch.example_id, state, description, index, experiment, policy, mesh)
