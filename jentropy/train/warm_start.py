"""Supervised stages, and the cache of warm starts by content."""

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fiddle as fdl
import jax
from jax.sharding import Mesh

from jentropy import config as config_lib
from jentropy.base import Policy
from jentropy.data.task import Task
from jentropy.train.checkpoint import Checkpoints, CorruptCheckpointError
from jentropy.train.experiment import Supervised
from jentropy.train.optimizer import compiled_part, init_optimizer
from jentropy.train.programs import make_supervised_step
from jentropy.train.sharding import param_shardings, row_sharding
from jentropy.train.state import optimizer_shardings

_SOURCES = ("head.py", "vocabulary.py", "train/optimizer.py", "train/programs.py", "train/warm_start.py")


def cache_folder() -> Path:
    """Where warm starts and compiled programs are kept: `$JENTROPY_CACHE`, or `~/.cache/jentropy`."""
    return Path(os.environ.get("JENTROPY_CACHE") or Path.home() / ".cache" / "jentropy")


def init_params(policy: Policy, seed: int, mesh: Mesh) -> Any:
    """New parameters, born sharded."""
    return jax.jit(policy.init, out_shardings=param_shardings(policy, mesh))(jax.random.key(seed))


def warm_start_name(config: fdl.Config, mesh: Mesh) -> str:
    """Hex digest of all that the parameters after a supervised first stage depend on."""
    parts = [config_lib.identity(part) for part in (config.stages[0], config.policy, config.task)]
    task = config_lib.build(config.task)
    parts += [repr(task.tokenizer), *(sha256 for _, sha256 in task.sources)]
    versions = [f"{name} {version(name)}" for name in ("jax", "jaxlib", "flax", "optax")]
    topology = f"{jax.default_backend()} {dict(mesh.shape)}"
    return hashlib.sha256(json.dumps([parts, versions, topology, _source()]).encode()).hexdigest()[:32]


def _source() -> str:
    """Hex digest of the code that a warm start runs through."""
    package = Path(__file__).resolve().parents[1]
    files = [*package.glob("policy/*.py"), *package.glob("data/*.py"), *(package / name for name in _SOURCES)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()


def run_supervised(
    stage: Supervised, policy: Policy, task: Task, params: Any, mesh: Mesh, report: Callable[[int, float], None]
) -> Any:
    """Trains `params` on the stage's demonstrations; returns the new parameters.

    Args:
      stage: what to do.
      policy: the model.
      task: gives the demonstrations.
      params: donated.
      mesh: devices.
      report: called with (step, loss in nats per token) every 50 steps.
    """
    source = task.demonstrations(stage.mixture, **stage.options)
    step_fn = make_supervised_step(policy, compiled_part(stage.optimizer), mesh)
    start = functools.partial(init_optimizer, stage.optimizer)
    shardings = optimizer_shardings(policy, mesh, stage.optimizer, jax.eval_shape(start, params))
    opt_state = jax.jit(start, out_shardings=shardings)(params)
    rows = row_sharding(mesh)
    for step in range(stage.steps):
        batch = source.batch(stage.seed, step, stage.batch_size)
        tokens, weight = jax.device_put((batch.tokens, batch.weight), rows)
        params, opt_state, loss = step_fn(params, opt_state, tokens, weight)
        if (step + 1) % 50 == 0 or step + 1 == stage.steps:
            report(step + 1, float(jax.device_get(loss)))
    return params


def _is_cached(checkpoints: Checkpoints) -> bool:
    """Whether there is a warm start that verifies; one that does not is made again, which sets it aside."""
    try:
        return checkpoints.latest_step() is not None
    except CorruptCheckpointError:
        return False


def _publish(folder: Path, params: Any, stage: str) -> None:
    """Saves a warm start as `folder`; written elsewhere and renamed, because other processes may do the same."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-") as draft:
        new = Path(draft) / "new"
        with Checkpoints(new, max_to_keep=1) as checkpoints:
            checkpoints.save(0, params, {"stage": stage})
        try:
            os.rename(new, folder)
        except OSError:  # not empty: another process was faster, or what is there is damaged
            with Checkpoints(folder, max_to_keep=1) as there:
                if _is_cached(there):
                    return
            os.rename(folder, Path(draft) / "damaged")
            os.rename(new, folder)


def cached_warm_start(
    config: fdl.Config, policy: Policy, mesh: Mesh, train: Callable[[], Any], cache: Path | None = None
) -> tuple[Any, bool]:
    """Parameters after the first stage: from the cache if the same warm start was made before, else from `train`.

    Several processes may make the same one at a time; each of them trains, and one of the equal results is kept.

    Returns:
      The parameters, and whether they came from the cache.
    """
    folder = (cache or cache_folder()) / "warm_starts" / warm_start_name(config, mesh)
    with Checkpoints(folder, max_to_keep=1) as checkpoints:
        if _is_cached(checkpoints):
            shapes = jax.eval_shape(policy.init, jax.random.key(0))
            template = jax.tree.map(
                lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                shapes,
                param_shardings(policy, mesh),
            )
            return checkpoints.restore(None, template)[0], True
        params = train()
        found = _is_cached(checkpoints)  # another run may have been faster
    if not found:
        _publish(folder, params, config.stages[0].name)
    return params, False
