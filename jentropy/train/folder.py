"""A run's folder: whether it may be used, and the files that say what the run is."""

import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fiddle as fdl
import jax

from jentropy import config as config_lib


def _commit() -> str | None:
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    found = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def _header(config: fdl.Config, seed: int) -> dict[str, Any]:
    names = ("jentropy", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {
        "identity": config_lib.identity(config),
        "seed": seed,
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
        "backend": jax.default_backend(),
        "devices": jax.device_count(),
    }


def prepare_folder(out: Path, resume: bool) -> None:
    """Creates the run's folder.

    Raises:
      FileExistsError: it holds a run already and `resume` is False.
      FileNotFoundError: `resume` is True and it holds none.
      PermissionError: it cannot be written to.
    """
    started = (out / "metrics.jsonl").exists()
    if started and not resume:
        raise FileExistsError(f"{out} holds a run already: resume it with --resume, or choose another --out")
    if resume and not started:
        raise FileNotFoundError(f"{out} holds no run to resume")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise PermissionError(f"cannot create the run folder {out}: {error}") from error
    if not os.access(out, os.W_OK):
        raise PermissionError(f"the run folder {out} is not writable")


def write_header(out: Path, config: fdl.Config, seed: int) -> str:
    """Writes `config.txt`, `config.json` and `run.json`; returns the diff to the config that was there, if any."""
    lines, path = config_lib.flatten(config), out / "config.txt"
    changed = config_lib.diff(config_lib.read_lines(path), lines) if path.exists() else ""
    config_lib.write_lines(path, lines)
    (out / "config.json").write_text(config_lib.dump(config), encoding="utf-8")
    (out / "run.json").write_text(json.dumps(_header(config, seed), indent=1) + "\n", encoding="utf-8")
    return changed
