"""The compiled programs between sampling and the step: which groups vary, groups put together, overlong filtering."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jentropy.base import Array, Metrics, Rollouts
from jentropy.rewards.shaping import mask_truncated
from jentropy.rollout.dynamic import Judged, judge_groups, place_groups
from jentropy.train.sharding import replicated, row_sharding

METRICS = ("dynamic/", "overlong/", "rollout/")
"""How the names of what they report begin."""

_LAST_KEY = 2**32
"""Rounds count down from here, so that no round of sampling folds in what is the number of a rollout."""


def round_keys(key: Array, num_rounds: int, mesh: Mesh) -> tuple[Array, ...]:
    """The keys of sampling of each round; the first is `key` itself, that of a run without dynamic sampling."""
    keys = [key, *(jax.random.fold_in(key, np.uint32(_LAST_KEY - n)) for n in range(1, num_rounds))]
    return tuple(jax.device_put(keys, replicated(mesh)))


@functools.lru_cache
def make_judge(column: int, num_groups: int, mesh: Mesh) -> Callable[[Rollouts], Judged]:
    """`judge_groups` on the devices, its result on the host."""
    judge = jax.jit(
        functools.partial(judge_groups, column=column, num_groups=num_groups), out_shardings=replicated(mesh)
    )
    return lambda rows: jax.device_get(judge(rows))


@functools.lru_cache
def make_place(mesh: Mesh) -> Callable[[Rollouts, Rollouts, np.ndarray, np.ndarray], Rollouts]:
    """`place_groups` on the devices; one program for all rounds, because shapes and places of arrays are fixed."""
    rows, whole = row_sharding(mesh), replicated(mesh)
    place = jax.jit(place_groups, in_shardings=(rows, rows, whole, whole), out_shardings=rows)

    def place_on_devices(kept: Rollouts, fresh: Rollouts, source: np.ndarray, is_padding: np.ndarray) -> Rollouts:
        kept, fresh = jax.device_put((kept, fresh), rows)
        return place(kept, fresh, *jax.device_put((source, is_padding), whole))

    return place_on_devices


@functools.lru_cache
def make_mask(mesh: Mesh) -> Callable[[Rollouts], tuple[Rollouts, Metrics]]:
    """`mask_truncated` on the devices, and `overlong/masked_fraction` of the rows."""

    def mask(rows: Rollouts) -> tuple[Rollouts, Metrics]:
        truncated = rows.row_data["truncated"].astype(jnp.float32)
        return mask_truncated(rows), {"overlong/masked_fraction": (jnp.sum(truncated), jnp.float32(truncated.size))}

    return jax.jit(mask, out_shardings=(row_sharding(mesh), replicated(mesh)))
