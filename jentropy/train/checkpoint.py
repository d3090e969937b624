"""Checkpoints of the whole training state, on Orbax's `CheckpointManager`.

A step holds two items: `state`, any pytree of arrays, Python numbers and typed PRNG keys, and `metadata`, a JSON
dictionary. Orbax loads changed bytes without a word and casts silently to the dtypes it is asked for. So every step has
a manifest (`jentropy.train.manifest`), sealed into its folder before the folder gets its name
(`jentropy.train.commit`); a step counts only if its manifest verifies, and `restore` first compares its template with
the leaves that the manifest lists.
"""

import contextlib
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from jentropy.train import commit
from jentropy.train import manifest as manifest_lib
from jentropy.train.manifest import Hook, no_hook

_STATE = "state"
_METADATA = "metadata"
_SHOWN = 3
"""Problems of a damaged step that a message names."""

_logger = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message names the folder or the leaf."""

    exit_code: ClassVar[int] = 2
    """What a process that this error ends should return."""


class CheckpointWriteError(CheckpointError):
    """The disk is full, read-only or failing."""

    exit_code: ClassVar[int] = 74


class CorruptCheckpointError(CheckpointError):
    """Files that are not as they were written, and no other step to use instead."""

    exit_code: ClassVar[int] = 65


class Checkpoints:
    """The checkpoints of one run, one folder per step.

    Saving is synchronous: when `save` returns, the step is complete and on the disk. Every process of a distributed run
    must make the same calls. A context manager: leaving it closes it.

    Args:
      directory: created if missing.
      max_to_keep: newest steps to keep; older ones are deleted as new ones are saved. None keeps all.
      strict: refuse to fall back from a damaged step to an older one.
      identity: of the config, recorded in the manifests.
      hook: called with the names in `commit.POINTS` as a save passes them.

    Raises:
      CheckpointWriteError: the folder cannot be created or written.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        max_to_keep: int | None = 3,
        strict: bool = False,
        identity: str | None = None,
        hook: Hook = no_hook,
    ) -> None:
        if max_to_keep is not None and max_to_keep < 1:
            raise ValueError(f"max_to_keep must be at least 1 or None, got {max_to_keep!r}")
        self.directory = Path(directory).resolve()
        self._max_to_keep, self._strict, self._identity, self._hook = max_to_keep, strict, identity, hook
        self._saving: tuple[int, Any] | None = None
        self._reported: set[int] = set()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.directory):
                pass
        except OSError as error:
            raise CheckpointWriteError(f"cannot write checkpoints to {self.directory}: {error}") from error
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                enable_async_checkpointing=False,
                lightweight_initialize=True,
                temporary_path_class=commit.sealing_path(self.directory, self._seal, hook),
            ),
            item_handlers={_STATE: ocp.StandardCheckpointHandler(), _METADATA: ocp.JsonCheckpointHandler()},
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def all_steps(self) -> list[int]:
        """The steps there are, ascending, verified or not."""
        return commit.list_steps(self.directory)

    def problems(self, step: int) -> list[str]:
        """What is wrong with a step's files, see `manifest.verify`; reads all of them."""
        return manifest_lib.verify(self.directory / str(step))

    def latest_step(self) -> int | None:
        """The newest step whose manifest verifies, None if there is no step at all; reads all its files.

        Newer steps that do not verify are named in a warning.

        Raises:
          CorruptCheckpointError: there are steps, but none verifies; or the newest does not, and `strict`.
        """
        damaged: dict[int, list[str]] = {}
        for step in reversed(self.all_steps()):
            problems = self.problems(step)
            if not problems:
                self._report(damaged, step)
                return step
            if (self.directory / str(step)).exists():  # another process may have deleted it meanwhile
                damaged[step] = problems
            if damaged and self._strict:
                break
        if not damaged:
            return None
        found = "; ".join(f"step {step} is damaged: {_shorten(problems)}" for step, problems in damaged.items())
        advice = "strict: no older step is used" if self._strict else "no step verifies"
        raise CorruptCheckpointError(f"{found} ({advice}, in {self.directory})")

    def _report(self, damaged: Mapping[int, Sequence[str]], step: int) -> None:
        """Warns of damaged steps, of each once."""
        for bad, problems in damaged.items():
            if bad not in self._reported:
                text = "step %d in %s is damaged: %s. Falling back to step %d"
                _logger.warning(text, bad, self.directory, _shorten(problems), step)
        self._reported |= damaged.keys()

    def latest_metadata(self) -> dict[str, Any] | None:
        """The metadata of `latest_step()`, None if there is none: enough to build the template of its state."""
        step = self.latest_step()
        if step is None:
            return None
        with self._reading(step):
            return self._manager.restore(step, args=ocp.args.Composite(**{_METADATA: ocp.args.JsonRestore()}))[
                _METADATA
            ]

    def save(self, step: int, state: Any, metadata: Mapping[str, Any]) -> None:
        """Writes `state` and `metadata` as `step`, then deletes the oldest steps if there are too many.

        Args:
          step: later than every step that exists. Later steps that do not verify are renamed to `<step>.damaged`.
          state: pytree of arrays, Python numbers and typed PRNG keys.
          metadata: what JSON can hold.

        Raises:
          CheckpointError: a step that is not the newest, or a leaf that is no array.
          CheckpointWriteError: the disk is full or failing; the steps that were there still are.
        """
        step = int(step)
        try:
            text = json.loads(json.dumps(dict(metadata)))
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"metadata of step {step} is not JSON: {error}") from error
        self._hook("before-save")
        self._saving = (step, _storable(state))
        args = {_STATE: ocp.args.StandardSave(self._saving[1]), _METADATA: ocp.args.JsonSave(text)}
        try:
            self._make_room(step)
            self._manager.save(step, args=ocp.args.Composite(**args), force=True)
            self.wait()
            if not (self.directory / str(step) / manifest_lib.NAME).is_file():
                raise ValueError("Orbax has committed it without a manifest")
        except (OSError, ValueError) as error:
            kind = CheckpointWriteError if isinstance(error, OSError) or _is_of_the_disk(error) else CheckpointError
            raise kind(f"cannot save step {step} to {self.directory}: {error}") from error
        finally:
            self._saving = None
        self._delete_old_steps()
        self._hook("after-save")

    def _make_room(self, step: int) -> None:
        """Removes what is in the way of a new step: leftovers, and later steps that do not verify."""
        later = [other for other in self.all_steps() if other >= step]
        for other in reversed(later):
            if not self.problems(other):
                raise CheckpointError(f"step {step} is not later than step {other} in {self.directory}")
        if jax.process_index() == 0:
            commit.delete_leftovers(self.directory)
            for other in later:
                commit.set_aside(self.directory, other)
        if later:
            ocp.multihost.sync_global_processes("jentropy: damaged steps are set aside")
            self._manager.reload()

    def _seal(self, complete: Path, final: Path) -> None:
        """Writes the manifest into the complete step and gives the step its final name."""
        assert self._saving is not None, "sealing outside of a save"
        step, state = self._saving
        fields = {
            "step": step,
            "identity": self._identity,
            "environment": _environment(),
            "leaves": _describe_leaves(state),
        }
        manifest_lib.write(complete, fields, self._hook)
        commit.commit(complete, final, self._hook)

    def _delete_old_steps(self) -> None:
        if self._max_to_keep is None or jax.process_index() != 0:
            return
        try:
            commit.delete_steps(self.directory, self.all_steps()[: -self._max_to_keep], self._hook)
        except OSError as error:
            raise CheckpointWriteError(f"cannot delete old steps in {self.directory}: {error}") from error

    def restore(self, step: int | None, template: Any) -> tuple[Any, dict[str, Any]]:
        """The state and metadata of `step`, after all its files have been verified.

        Warns if the step was written by other versions or on other devices: then nobody promises a bitwise resume.

        Args:
          step: None for `latest_step()`.
          template: pytree of the state's structure, of arrays or of `jax.ShapeDtypeStruct` with shardings: each leaf
            comes back with the template's sharding, on any mesh.

        Raises:
          CheckpointError: no such step; or a leaf that is missing, unknown or of another shape or dtype, named.
          CorruptCheckpointError: files that are not as they were written.
        """
        chosen = self.latest_step() if step is None else int(step)
        steps = self.all_steps()
        if chosen is None or chosen not in steps:
            wanted = "checkpoint" if chosen is None else f"step {chosen}"
            raise CheckpointError(f"no {wanted} in {self.directory}; steps there: {steps or 'none'}")
        problems = self.problems(chosen) if step is not None else []
        if problems:
            raise CorruptCheckpointError(f"step {chosen} in {self.directory} is damaged: {_shorten(problems)}")
        abstract = jax.tree.map(_abstract, _storable(template))
        items = {_STATE: ocp.args.StandardRestore(abstract), _METADATA: ocp.args.JsonRestore()}
        with self._reading(chosen):
            manifest = manifest_lib.read(self.directory / str(chosen))
            self._compare(chosen, _describe_leaves(abstract), manifest["leaves"])
            restored = self._manager.restore(chosen, args=ocp.args.Composite(**items))
        self._compare(chosen, _describe_leaves(abstract), _describe_leaves(restored[_STATE]))
        changed = manifest_lib.differences(manifest["environment"], _environment())
        if changed:
            text = "step %d in %s was written with %s: resuming it is not promised to be bitwise equal"
            _logger.warning(text, chosen, self.directory, ", ".join(changed))
        return restored[_STATE], restored[_METADATA]

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Turns what Orbax raises for files it cannot read into a CheckpointError."""
        try:
            yield
        except (OSError, ValueError) as error:
            raise CheckpointError(f"step {step} in {self.directory} cannot be read: {error}") from error

    def _compare(self, step: int, expected: Mapping[str, str], actual: Mapping[str, str]) -> None:
        """Raises unless the leaves of the step are those of the template."""
        where = f"step {step} in {self.directory}"
        for name, leaf in expected.items():
            if name not in actual:
                raise CheckpointError(f"{where} has no leaf {name}, where the state has {leaf}")
            if actual[name] != leaf:
                raise CheckpointError(f"{where} has {actual[name]} at leaf {name}, where the state has {leaf}")
        for name in actual.keys() - expected.keys():
            raise CheckpointError(f"{where} has {actual[name]} at leaf {name}, where the state has nothing")

    def wait(self) -> None:
        """Returns when everything saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and frees what the manager holds."""
        self._manager.close()


def _is_of_the_disk(error: ValueError) -> bool:
    """Whether an error of TensorStore, which has a type of its own for none, comes from the operating system."""
    return "RESOURCE_EXHAUSTED" in str(error) or "os_error_code=" in str(error)


def _storable(tree: Any) -> Any:
    """NumPy scalars as arrays, because Orbax takes no others in templates."""
    return jax.tree.map(lambda leaf: np.asarray(leaf) if isinstance(leaf, np.generic) else leaf, tree)


def _abstract(leaf: Any) -> Any:
    """A JAX array as its shape, dtype and sharding."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) if isinstance(leaf, jax.Array) else leaf


def _describe_leaves(tree: Any) -> dict[str, str]:
    """`{path: type}` of arrays and Python numbers, such as `params/w: float32[3, 4]`."""

    def describe(leaf: Any) -> str:
        if isinstance(leaf, (bool, int, float)):
            return type(leaf).__name__
        return f"{leaf.dtype}{list(leaf.shape)}"

    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): describe(leaf) for path, leaf in flat}


def _environment() -> dict[str, str]:
    return manifest_lib.environment(f"{jax.device_count()} {jax.default_backend()}")


def _shorten(problems: Sequence[str]) -> str:
    more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return "; ".join(problems[:_SHOWN]) + more
