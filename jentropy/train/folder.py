"""A run's folder: whether it may be used, and the files that say what the run is."""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fiddle as fdl
import jax

from jentropy import config as config_lib
from jentropy.data.jsonl import CorruptDataError
from jentropy.train.experiment import Experiment
from jentropy.train.lock import RunLock
from jentropy.train.preflight import check_no_links
from jentropy.train.resume_rules import check_resume, write_lineage


def _commit() -> str | None:
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    found = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def _header(config: fdl.Config, experiment: Experiment) -> dict[str, Any]:
    names = ("jentropy", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {
        "identity": config_lib.identity(config),
        "seed": experiment.seed,
        "sources": dict(experiment.task.sources),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
        "backend": jax.default_backend(),
        "devices": jax.device_count(),
    }


def open_folder(out: Path, resume: bool) -> RunLock:
    """Creates the run's folder if it is new, and locks it.

    Raises:
      FileNotFoundError: `resume` is True and the folder holds no run.
      PermissionError: it cannot be written to.
      LockedError: another process runs in it.
      FileExistsError: it holds a run already and `resume` is False.
      OSError: there is a symbolic link in it.
    """
    metrics = out / "metrics.jsonl"
    if resume and not metrics.exists():
        raise FileNotFoundError(f"{out} holds no run to resume")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise PermissionError(f"cannot create the run folder {out}: {error}") from error
    if not os.access(out, os.W_OK):
        raise PermissionError(f"the run folder {out} is not writable")
    check_no_links(out)
    lock = RunLock(out)
    if metrics.exists() and not resume:
        lock.release()
        raise FileExistsError(f"{out} holds a run already: resume it with --resume, or choose another --out")
    return lock


def write_header(
    out: Path, config: fdl.Config, experiment: Experiment, *, allow_change: bool, stage: int | None
) -> None:
    """Writes `config.txt`, `config.json` and `run.json`, and records a resumption in `lineage.jsonl`.

    Args:
      out: the run's folder.
      config: of the experiment.
      experiment: what it builds.
      allow_change: whether changes that need it are allowed.
      stage: index of the stage that the run resumes in; None from the start.

    Raises:
      ConfigError: the config differs from that of the run where it may not.
      CorruptDataError: the data files are not those of the run.
    """
    lines, path = config_lib.flatten(config), out / "config.txt"
    header = _header(config, experiment)
    if (out / "run.json").exists():
        sources = json.loads((out / "run.json").read_text(encoding="utf-8")).get("sources", {})
        if sources != header["sources"]:
            raise CorruptDataError(f"the data of the run have changed: {sources} -> {header['sources']}")
    if path.exists():
        old = config_lib.read_lines(path)
        record = check_resume(old, lines, allow_change, stage)
        write_lineage(out, record | header)
        if record["changes"]:
            print(f"resumed with a changed config:\n{config_lib.diff(old, lines)}", file=sys.stderr)
    config_lib.write_lines(path, lines)
    (out / "config.json").write_text(config_lib.dump(config), encoding="utf-8")
    (out / "run.json").write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")
