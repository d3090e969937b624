"""What becomes of rollouts whose updates were skipped: they are kept for `jentropy doctor`, and too many stop the run.

`train_step` skips an update whose loss or gradient is not finite, or that has no valid token. The rollouts it was made
of are written below `RUN/quarantine/`: `step-00000012.npz` holds the arrays, without pickle, and `step-00000012.json`
what they are: ids, seed, step, and the checksum of the arrays. The JSON is written last, so a batch is there as a whole
or not at all, and equal batches are equal bytes.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jentropy.base import Rollouts, require

SKIPPED = "update/skipped"
"""The metric of every rollout: the fraction of its updates that were skipped."""

_NESTED = ("token_data", "row_data")


class NumericError(RuntimeError):
    """Numbers that are not finite, again and again: the run has stopped, and its newest checkpoint is kept."""

    exit_code = 70


class QuarantineError(ValueError):
    """A quarantined batch that is not there, or is not what was written; the message names the file."""

    exit_code = 65


class Batch(NamedTuple):
    """What one training step was given.

    Attributes:
      rollouts: B rows, as the step took them.
      example_id: `[P]` int64, the prompts' places in their source.
    """

    rollouts: Rollouts
    example_id: np.ndarray


def trailing_skips(lines: Iterable[Mapping[str, Any]]) -> int:
    """How many of the last rollouts in the lines of a `metrics.jsonl`, without a gap, had updates skipped."""
    count = 0
    for line in lines:
        if SKIPPED in line:
            count = count + 1 if line[SKIPPED] > 0 else 0
    return count


class Quarantine:
    """The quarantine of one run, and the rule that stops it.

    Args:
      directory: created with the first batch.
      seed: of the run.
      in_a_row: rollouts with skipped updates right before the first one observed: `trailing_skips` of a resumed run.
      limit: rollouts in a row that may have skipped updates.
      max_kept: newest batches to keep.
    """

    def __init__(
        self, directory: str | Path, *, seed: int, in_a_row: int = 0, limit: int = 3, max_kept: int = 32
    ) -> None:
        require(limit >= 0, "limit", limit, "at least 0")
        require(max_kept >= 1, "max_kept", max_kept, "at least 1")
        self.directory = Path(directory)
        self._seed, self._in_a_row, self._limit, self._max_kept = seed, in_a_row, limit, max_kept

    def observe(self, step: int, stage: str, metrics: Mapping[str, Any], batch: Batch) -> bool:
        """Stores the batch if some of its updates were skipped; returns whether it did.

        Args:
          step: the rollout's number.
          stage: name of its stage.
          metrics: of the rollout, as they are written to `metrics.jsonl`.
          batch: what the step was given, on the devices or the host.

        Raises:
          NumericError: more than `limit` rollouts in a row had skipped updates; this one is stored.
          OSError: the batch cannot be written.
        """
        skipped = metrics.get(SKIPPED, 0.0)
        if not skipped > 0:
            self._in_a_row = 0
            return False
        self._in_a_row += 1
        save_batch(self.directory, batch, {"step": step, "stage": stage, "seed": self._seed, SKIPPED: skipped})
        for old in stored_steps(self.directory)[: -self._max_kept]:
            for path in _paths(self.directory, old)[::-1]:
                path.unlink(missing_ok=True)
        if self._in_a_row > self._limit:
            raise NumericError(
                f"the last {self._in_a_row} rollouts, up to step {step}, had updates skipped, because a loss or "
                f"gradient was not finite or no token was valid; {self._limit} in a row are allowed. The newest "
                f"checkpoint is kept; `jentropy doctor --replay` says whether those in {self.directory} fail again"
            )
        return True


def _paths(directory: Path, step: int) -> tuple[Path, Path]:
    """The files of a batch: arrays, description."""
    return directory / f"step-{step:08d}.npz", directory / f"step-{step:08d}.json"


def stored_steps(directory: str | Path) -> list[int]:
    """Steps of the batches in a quarantine, ascending; none if there is no such folder."""
    names = (path.stem.removeprefix("step-") for path in Path(directory).glob("step-*.json"))
    return sorted(int(name) for name in names if name.isdecimal())


def flatten(rollouts: Rollouts) -> dict[str, np.ndarray]:
    """Arrays by name on the host; those of `token_data` and `row_data` as `token_data/name`."""
    fields = dict(vars(rollouts))
    nested = {f"{field}/{name}": value for field in _NESTED for name, value in fields.pop(field).items()}
    return {name: np.asarray(value) for name, value in jax.device_get({**fields, **nested}).items()}


def unflatten(arrays: Mapping[str, np.ndarray]) -> Rollouts:
    """The rollouts whose arrays `flatten` named."""
    fields: dict[str, Any] = {name: {} for name in _NESTED}
    for name, value in arrays.items():
        field, _, inner = name.partition("/")
        if inner:
            fields[field][inner] = value
        else:
            fields[field] = value
    return Rollouts(**fields)


def non_finite_rows(rollouts: Rollouts) -> dict[str, list[int]]:
    """Row ids with a NaN or infinity, by the name of the array; per-token arrays count inside the loss mask only."""
    arrays, found = flatten(rollouts), {}
    for name, array in arrays.items():
        if array.dtype.kind in "iub":
            continue
        bad = ~np.isfinite(array.astype(np.float64))
        if array.shape == arrays["loss_mask"].shape and name != "rewards":
            bad &= arrays["loss_mask"]
        rows = arrays["row_id"][bad.reshape(len(bad), -1).any(axis=1)]
        if len(rows):
            found[name] = rows.tolist()
    return found


def save_batch(directory: str | Path, batch: Batch, what: Mapping[str, Any]) -> None:
    """Writes a batch; one of the same step is replaced.

    Args:
      directory: created if missing.
      batch: on the devices or the host.
      what: JSON values by name; `step` among them.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    arrays = flatten(batch.rollouts)
    file = io.BytesIO()
    # NumPy cannot name the types of ml_dtypes (bfloat16) in a file: they are stored as bytes, and named in the JSON.
    plain = {name: a.view(f"V{a.itemsize}") if a.dtype.kind == "V" else a for name, a in arrays.items()}
    np.savez(file, **plain)  # pyright: ignore[reportArgumentType]
    data = file.getvalue()
    description = {
        **what,
        "example_id": np.asarray(batch.example_id).tolist(),
        "row_id": arrays["row_id"].tolist(),
        "non_finite": non_finite_rows(batch.rollouts),
        "dtypes": {name: array.dtype.name for name, array in sorted(arrays.items())},
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    arrays_path, description_path = _paths(directory, what["step"])
    write_whole(arrays_path, data)
    write_whole(description_path, json.dumps(description, sort_keys=True).encode() + b"\n")


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file as a whole or not at all, on disk when it returns."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_description(directory: str | Path, step: int) -> dict[str, Any]:
    """What is said of a stored batch: what `save_batch` was given, the ids of its prompts and rows, `non_finite`.

    Raises:
      QuarantineError: there is no such batch, or its description is not what was written.
    """
    path = _paths(Path(directory), step)[1]
    try:
        description = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise QuarantineError(f"{path}: no batch of step {step}; stored: {stored_steps(directory) or 'none'}") from None
    except ValueError as error:
        raise QuarantineError(f"{path} is damaged: {error}") from error
    if not isinstance(description, dict) or description.get("step") != step:
        raise QuarantineError(f"{path} is damaged: it does not describe step {step}")
    return description


def load_batch(directory: str | Path, step: int) -> tuple[Batch, dict[str, Any]]:
    """A stored batch, on the host, and its description; the arrays are verified against their checksum.

    Raises:
      QuarantineError: there is no such batch, or its files are not what was written.
    """
    description, path = read_description(directory, step), _paths(Path(directory), step)[0]
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise QuarantineError(f"{path} is missing") from None
    if hashlib.sha256(data).hexdigest() != description.get("sha256"):
        raise QuarantineError(f"{path} is damaged: its checksum is not the one in {path.with_suffix('.json').name}")
    with np.load(io.BytesIO(data), allow_pickle=False) as stored:
        try:
            dtypes = {name: np.dtype(dtype) for name, dtype in description["dtypes"].items()}
            rollouts = unflatten({name: stored[name].view(dtype) for name, dtype in dtypes.items()})
            return Batch(rollouts, np.asarray(description["example_id"], np.int64)), description
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise QuarantineError(f"{path.with_suffix('.json')} is damaged: {error!r}") from error
