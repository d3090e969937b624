"""The one place that names mesh axes: the mesh, and what lies where on it."""

import dataclasses
import functools
import logging
import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jentropy.base import Policy, require

AXES = ("data", "fsdp", "tensor")
ROWS = P(("data", "fsdp"))
"""Rows of a batch lie over `data` and `fsdp`; everything else of a batch is whole on each device."""

LOGICAL_RULES: dict[str, str | None] = {
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "head": None,
    "layers": None,
}
"""Logical axis names of parameters to mesh axes."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Devices per axis; -1 for at most one axis takes what is left.

    Attributes:
      data: replicas of the parameters; rows are split over it.
      fsdp: shards of parameters and optimizer state; rows are split over it too.
      tensor: shards of heads, hidden units and vocabulary.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def resolve(self, num_devices: int) -> tuple[int, int, int]:
        """The shape with -1 filled in; raises `ValueError` if it does not use exactly `num_devices`."""
        shape = [self.data, self.fsdp, self.tensor]
        for name, size in zip(AXES, shape):
            require(size == -1 or size >= 1, f"mesh.{name}", size, "positive, or -1 for the rest")
        require(shape.count(-1) <= 1, "mesh", tuple(shape), "with at most one -1")
        known = math.prod(size for size in shape if size != -1)
        if -1 in shape and num_devices % known == 0:
            shape[shape.index(-1)] = num_devices // known
        if math.prod(shape) != num_devices:
            raise ValueError(f"mesh {dict(zip(AXES, shape))} does not use exactly the {num_devices} devices there are")
        return shape[0], shape[1], shape[2]


@functools.lru_cache
def make_mesh(shape: MeshShape, num_devices: int | None = None) -> Mesh:
    """A mesh of Auto axes over the first `num_devices` devices (default: all)."""
    devices = jax.devices()[:num_devices]
    return jax.make_mesh(shape.resolve(len(devices)), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, P())


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over `data` and `fsdp`."""
    return NamedSharding(mesh, ROWS)


def num_row_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are cut."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_rows(mesh: Mesh, num_rows: int, name: str) -> None:
    """Raises `ValueError` naming the numbers if the mesh does not divide `num_rows`."""
    shards = num_row_shards(mesh)
    if num_rows % shards:
        raise ValueError(f"{name} = {num_rows} rows do not divide over data * fsdp = {shards} shards of the mesh")


def constrain_rows(tree: Any, mesh: Mesh) -> Any:
    """Inside jit: keeps the leading axis of every leaf over the row shards."""
    return jax.lax.with_sharding_constraint(tree, row_sharding(mesh))


def _spec(path: Any, shape: tuple[int, ...], names: tuple[str | None, ...], mesh: Mesh) -> P:
    axes: list[str | None] = []
    for size, name in zip(shape, names, strict=True):
        axis = LOGICAL_RULES[name] if name is not None else None
        if axis is not None and size % mesh.shape[axis]:
            where = jax.tree_util.keystr(path)
            _log.warning("%s: %s = %d does not divide over %s = %d: whole", where, name, size, axis, mesh.shape[axis])
            axis = None
        axes.append(None if axis in axes else axis)
    return P(*axes)


def param_shardings(policy: Policy, mesh: Mesh) -> Any:
    """Shardings of the parameters: logical axes mapped by `LOGICAL_RULES`, whole where an axis does not divide."""
    shapes = jax.eval_shape(policy.init, jax.random.key(0))
    names = policy.logical_axes()
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf, axes: NamedSharding(mesh, _spec(path, leaf.shape, axes, mesh)), shapes, names
    )
