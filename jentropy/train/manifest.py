"""The manifest of a checkpoint: what every file of a step must be, so that no changed byte is ever trained on.

`MANIFEST.json` lists each file of the step's folder with its size and CRC-32, which sees every flip of up to 32
neighbouring bits and lets 1 in 2^32 other changes pass (1.3 GB/s on a core; it guards against accidents, not against
people). It also holds the step, the leaves of the state with shapes and dtypes, the identity of the config, and the
versions it was written with. Its own last field is the SHA-256 of the rest, and it has one valid spelling, so a change
anywhere in it shows too. It is written as the last file of a step, see `jentropy.train.commit`.

Nothing here imports JAX: a folder can be verified from any Python.
"""

import errno
import hashlib
import json
import os
import stat
import zlib
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

NAME = "MANIFEST.json"
FORMAT = 1
PACKAGES = ("jentropy", "jax", "jaxlib", "orbax-checkpoint", "numpy")
"""Whose versions are recorded."""

_CHUNK_BYTES = 1 << 22

Hook = Callable[[str], None]
"""Called with the name of a point that has been reached; tests kill the process there."""


def no_hook(point: str) -> None:
    """Does nothing."""


def write(folder: Path, fields: Mapping[str, Any], hook: Hook = no_hook) -> None:
    """Writes the manifest of all that is in `folder`; when it returns, all of it is on the disk.

    Args:
      folder: of a step, complete but for the manifest.
      fields: what JSON can hold: `step`, `leaves`, `identity`, `environment`.
      hook: called at `before-manifest`, `during-manifest` and `after-manifest`.

    Raises:
      OSError: it cannot be written.
    """
    files = {name: _measure(path, sync=True) for name, path in _list_files(folder).items()}
    hook("before-manifest")
    data = _render({"format": FORMAT, **fields, "files": files})
    with (folder / NAME).open("wb") as file:
        file.write(data[: len(data) // 2])
        file.flush()
        hook("during-manifest")
        file.write(data[len(data) // 2 :])
        file.flush()
        os.fsync(file.fileno())
    for path, _, _ in os.walk(folder, topdown=False):
        sync_folder(Path(path))
    hook("after-manifest")


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a step, itself verified.

    Raises:
      OSError: there is none, or it cannot be read.
      ValueError: it is not as it was written.
    """
    data = (folder / NAME).read_bytes()
    try:
        content = json.loads(data.decode("utf-8"))
        valid = isinstance(content, dict) and content.pop("sha256", None) is not None and _render(content) == data
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is torn or damaged: {error}") from error
    if not valid:
        raise ValueError("is damaged: it does not have its own checksum")
    if content["format"] != FORMAT:
        raise ValueError(f"has format {content['format']}, this version of jentropy reads {FORMAT}")
    return content


def verify(folder: str | Path) -> list[str]:
    """What is wrong with the step in `folder`, one line `file: problem` each; empty if every byte is as it was written.

    Args:
      folder: of a step, such as `RUN/checkpoints/300`.
    """
    folder = Path(folder)
    try:
        content = read(folder)
    except FileNotFoundError:
        return [f"{NAME}: missing"]
    except (OSError, ValueError) as error:
        return [f"{NAME}: {error}"]
    problems = []
    if str(content["step"]) != folder.name:
        problems.append(f"{NAME}: is that of step {content['step']}")
    found = _list_files(folder)
    for name, expected in content["files"].items():
        problem = _check(found[name], expected) if name in found else "missing"
        problems += [f"{name}: {problem}"] if problem else []
    return problems + [f"{name}: not in the manifest" for name in sorted(found.keys() - content["files"].keys())]


def environment(topology: str) -> dict[str, str]:
    """The versions that a bitwise resume depends on, and the `topology`, such as `8 cpu`."""
    return {**{name: version(name) for name in PACKAGES}, "devices": topology}


def differences(written: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The entries of two environments that differ, such as `jax 0.9.0 (now 0.10.2)`."""
    names = [name for name in {**written, **now} if written.get(name) != now.get(name)]
    return [f"{name} {written.get(name, 'unknown')} (now {now.get(name, 'unknown')})" for name in names]


def sync_folder(folder: Path) -> None:
    """Brings the names in a folder to the disk, where the file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _render(content: Mapping[str, Any]) -> bytes:
    """The one spelling of a manifest."""
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=1).encode() + b"\n"


def _list_files(folder: Path) -> dict[str, Path]:
    """All but the manifest and folders, by name relative to `folder`, sorted; a link to a folder counts as a file."""
    paths = []
    for path, folders, files in os.walk(folder):
        paths += [Path(path, name) for name in files]
        paths += [Path(path, name) for name in folders if Path(path, name).is_symlink()]
    return {path.relative_to(folder).as_posix(): path for path in sorted(paths) if path != folder / NAME}


def _measure(path: Path, *, sync: bool = False) -> dict[str, Any]:
    """Size in bytes and CRC-32 of a file; with `sync` it is brought to the disk."""
    crc, size = 0, 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
        if sync:
            os.fsync(file.fileno())
    return {"bytes": size, "crc32": f"{crc:08x}"}


def _check(path: Path, expected: Mapping[str, Any]) -> str:
    """How a file differs from its entry in the manifest, empty if it does not."""
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            return "is no regular file"
        if status.st_size != expected["bytes"]:
            return f"has {status.st_size} bytes instead of {expected['bytes']}"
        crc = _measure(path)["crc32"]
    except OSError as error:
        return f"cannot be read: {error}"
    return "" if crc == expected["crc32"] else f"has checksum {crc} instead of {expected['crc32']}"
