"""What is checked before a run writes anything: its name, its folder, the room on the disk."""

import errno
import os
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

_ROOM = 2.2
"""Checkpoints that must find room: the one being written, the one before it, and what else a run writes."""


def check_name(name: str) -> None:
    """Raises `ValueError` unless `name` can be that of a run: 1 to 100 letters, digits, dots, dashes, underscores.

    It begins with a letter or digit, so it is no hidden file, no option of a command and neither `.` nor `..`.
    """
    if _NAME.fullmatch(name) is None:
        raise ValueError(
            f"name must be 1 to 100 letters, digits, dots, dashes and underscores, the first a letter or digit, "
            f"got {name[:120]!r}"
        )


def run_folder(root: str | os.PathLike, name: str) -> Path:
    """The folder `root/name`, which need not exist; nothing in it leads elsewhere.

    Args:
      root: the output root; may be a symbolic link itself.
      name: of the run, see `check_name`.

    Raises:
      ValueError: a bad name, or a folder that lies elsewhere in truth.
      OSError: see `check_no_links`.
    """
    check_name(name)
    folder = Path(root) / name
    if folder.resolve() != Path(root).resolve() / name:
        raise ValueError(f"the run folder {folder} leads out of {root}, to {folder.resolve()}")
    check_no_links(folder)
    return folder


def check_no_links(folder: str | os.PathLike) -> None:
    """Raises `OSError` naming the first symbolic link inside `folder`: a run would write through it."""
    for parent, folders, files in os.walk(folder):
        for name in sorted(folders + files):
            path = Path(parent) / name
            if path.is_symlink():
                raise OSError(errno.ELOOP, "a symbolic link in a run folder", str(path))


def num_bytes(tree: Any) -> int:
    """Bytes of the arrays, or of the shapes of arrays, of `tree`; Python numbers count 8.

    >>> num_bytes({"w": np.zeros((3, 4), np.float32), "n": 1})
    56
    """

    def size(leaf: Any) -> int:
        if isinstance(leaf, (bool, int, float)):
            return 8
        return int(np.prod(leaf.shape, dtype=np.int64)) * leaf.dtype.itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))


def check_room(folder: str | os.PathLike, checkpoint_bytes: int) -> None:
    """Raises `OSError` (ENOSPC) unless 2.2 checkpoints fit on the disk of `folder`, which exists.

    What this user may still write counts, without blocks kept for root; quotas and limits of single files cannot be
    seen from here.
    """
    needed, free = round(_ROOM * checkpoint_bytes), shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{free / 1e6:.1f} MB are free and {needed / 1e6:.1f} MB needed, {_ROOM} checkpoints of "
            f"{checkpoint_bytes / 1e6:.1f} MB",
            str(folder),
        )
