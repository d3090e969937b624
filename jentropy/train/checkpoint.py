"""Checkpoints of the whole training state, on Orbax's `CheckpointManager`.

A step holds two items: `state`, any pytree of arrays, Python numbers and typed PRNG keys, and `metadata`, a JSON
dictionary. Orbax writes into a temporary folder and renames it, so a step is there as a whole or not at all; it casts
silently to the dtypes it is asked for, so `restore` first compares its template with what the checkpoint says it holds.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

_STATE = "state"
_METADATA = "metadata"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message names the folder or the leaf."""


class Checkpoints:
    """The checkpoints of one run, one folder per step.

    Saving is synchronous: when `save` returns, the step is complete. Every process of a distributed run must make the
    same calls. A context manager: leaving it closes it.

    Args:
      directory: created if missing.
      max_to_keep: newest steps to keep; older ones are deleted as new ones are saved. None keeps all.

    Raises:
      CheckpointError: the folder cannot be created or written.
    """

    def __init__(self, directory: str | Path, *, max_to_keep: int | None = 3) -> None:
        if max_to_keep is not None and max_to_keep < 1:
            raise ValueError(f"max_to_keep must be at least 1 or None, got {max_to_keep!r}")
        self.directory = Path(directory).resolve()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.directory):
                pass
        except OSError as error:
            raise CheckpointError(f"cannot write checkpoints to {self.directory}: {error}") from error
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, enable_async_checkpointing=False),
            item_handlers={_STATE: ocp.StandardCheckpointHandler(), _METADATA: ocp.JsonCheckpointHandler()},
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def all_steps(self) -> list[int]:
        """The complete steps, ascending."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """The newest complete step, None if there is none."""
        return self._manager.latest_step()

    def latest_metadata(self) -> dict[str, Any] | None:
        """The metadata of the newest step, None if there is none: enough to build the template of its state."""
        step = self.latest_step()
        if step is None:
            return None
        with self._reading(step):
            return self._manager.restore(step, args=ocp.args.Composite(**{_METADATA: ocp.args.JsonRestore()}))[
                _METADATA
            ]

    def save(self, step: int, state: Any, metadata: Mapping[str, Any]) -> None:
        """Writes `state` and `metadata` as `step`.

        Args:
          step: later than every step that exists.
          state: pytree of arrays, Python numbers and typed PRNG keys.
          metadata: what JSON can hold.

        Raises:
          CheckpointError: a step that is not the newest, a leaf that is no array, or a failed write.
        """
        step, latest = int(step), self.latest_step()
        if latest is not None and step <= latest:
            raise CheckpointError(f"step {step} is not later than step {latest} in {self.directory}")
        try:
            text = json.loads(json.dumps(dict(metadata)))
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"metadata of step {step} is not JSON: {error}") from error
        args = ocp.args.Composite(
            **{_STATE: ocp.args.StandardSave(_storable(state)), _METADATA: ocp.args.JsonSave(text)}
        )
        try:
            saved = self._manager.save(step, args=args, force=True)
            self.wait()
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot save step {step} to {self.directory}: {error}") from error
        if not saved:
            raise CheckpointError(f"step {step} was not saved to {self.directory}")

    def restore(self, step: int | None, template: Any) -> tuple[Any, dict[str, Any]]:
        """The state and metadata of `step`.

        Args:
          step: None for the newest.
          template: pytree of the state's structure, of arrays or of `jax.ShapeDtypeStruct` with shardings: each leaf
            comes back with the template's sharding, on any mesh.

        Raises:
          CheckpointError: no such step; a leaf that is missing, unknown or of another shape or dtype, named; or files
            that cannot be read.
        """
        steps = self.all_steps()
        step = self.latest_step() if step is None else int(step)
        if step not in steps:
            wanted = "checkpoint" if step is None else f"step {step}"
            raise CheckpointError(f"no {wanted} in {self.directory}; steps there: {steps or 'none'}")
        abstract = jax.tree.map(_abstract, _storable(template))
        items = {_STATE: ocp.args.StandardRestore(abstract), _METADATA: ocp.args.JsonRestore()}
        with self._reading(step):
            stored = self._manager.item_metadata(step)[_STATE]
            if stored is None:
                raise ValueError("it holds no state")
            self._compare(step, jax.tree.map(_without_keys, abstract), stored.tree)
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        self._compare(step, abstract, restored[_STATE])
        return restored[_STATE], restored[_METADATA]

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Turns what Orbax raises for files it cannot read into a CheckpointError."""
        try:
            yield
        except (OSError, ValueError) as error:
            raise CheckpointError(f"step {step} in {self.directory} cannot be read: {error}") from error

    def _compare(self, step: int, template: Any, found: Any) -> None:
        """Raises unless `found`, the stored metadata or the restored state, has the template's leaves."""
        expected, actual = _describe_leaves(template), _describe_leaves(found)
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


def _storable(tree: Any) -> Any:
    """NumPy scalars as arrays, because Orbax takes no others in templates."""
    return jax.tree.map(lambda leaf: np.asarray(leaf) if isinstance(leaf, np.generic) else leaf, tree)


def _abstract(leaf: Any) -> Any:
    """A JAX array as its shape, dtype and sharding."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) if isinstance(leaf, jax.Array) else leaf


def _without_keys(leaf: Any) -> Any:
    """A typed PRNG key as the integers that are stored for it."""
    is_key = isinstance(leaf, jax.ShapeDtypeStruct) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.eval_shape(jax.random.key_data, leaf) if is_key else leaf


def _describe_leaves(tree: Any) -> dict[str, str]:
    """`{path: type}` of arrays, Python numbers or Orbax's metadata of either, such as `params/w: float32[3, 4]`."""

    def describe(leaf: Any) -> str:
        if isinstance(leaf, ocp.metadata.ScalarMetadata):
            return {"b": "bool", "i": "int", "f": "float"}[np.dtype(leaf.dtype).kind]
        if isinstance(leaf, (bool, int, float)):
            return type(leaf).__name__
        return f"{leaf.dtype}{list(leaf.shape)}"

    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): describe(leaf) for path, leaf in flat}
