"""How a checkpoint becomes a step, and how it stops being one: by one rename each.

Orbax writes a step below a temporary name and calls `TemporaryPath.finalize`, in one process, when every process has
written its files; its `CheckpointManagerOptions.temporary_path_class` says with which class. Ours lets Orbax finish the
folder under a second temporary name, has it sealed there with a manifest, brings it to the disk and only then gives it
its final name. So a folder with the name of a step had its manifest before it had the name. Orbax alone brings neither
its JSON files nor the folders to the disk, so after a loss of power a step could be there without its content.

An old step is renamed to a temporary name before its files are deleted, so that half a step never looks like one.
"""

import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from orbax.checkpoint.path import atomicity

from jentropy.train.manifest import Hook, sync_folder

POINTS = (
    "before-save",
    "after-create",
    "before-state",
    "after-state",
    "before-metadata",
    "after-metadata",
    "after-files",
    "before-manifest",
    "during-manifest",
    "after-manifest",
    "before-rename",
    "after-rename",
    "after-commit",
    "before-prune",
    "during-prune",
    "after-prune",
    "after-save",
)
"""The points inside a save at which a hook is called, in an order that may occur; the last steps only when one is old.

`state` and `metadata` are the items of a step; `after-files` is before Orbax's own mark of success.
"""

_TEMPORARY = atomicity.TMP_DIR_SUFFIX
_DAMAGED = ".damaged"


def sealing_path(directory: Path, seal: Callable[[Path, Path], None], hook: Hook) -> type:
    """The class of Orbax's temporary paths, for the checkpoints in `directory`.

    Args:
      directory: parent of the steps.
      seal: called with the complete step under its temporary name, and with its final path, where it must move it.
      hook: see `POINTS`.
    """

    class SealingPath(atomicity.AtomicRenameTemporaryPath):
        """A step, or an item inside one, under its temporary name."""

        async def create(self):
            path = await super().create()
            if Path(self.get_final()).parent == directory:
                hook("after-create")
            return path

        async def finalize(self):
            final = self.get_final()
            if Path(final).parent != directory:
                hook(f"before-{final.name}")
                await super().finalize()
                hook(f"after-{final.name}")
                return
            hook("after-files")
            self._final_path = final.parent / f"{final.name}{_TEMPORARY}-complete"
            try:
                await super().finalize()
                seal(Path(self._final_path), Path(final))
            finally:
                self._final_path = final

    return SealingPath


def commit(sealed: Path, final: Path, hook: Hook) -> None:
    """Gives a sealed step its final name, on the disk too."""
    hook("before-rename")
    os.rename(sealed, final)
    hook("after-rename")
    sync_folder(final.parent)
    hook("after-commit")


def list_steps(directory: Path) -> list[int]:
    """The steps in `directory` by their names, ascending."""
    names = [path.name for path in directory.iterdir() if path.is_dir()]
    return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9]\d*", name, re.ASCII))


def delete_steps(directory: Path, steps: Sequence[int], hook: Hook) -> None:
    """Deletes steps; interrupted anywhere, each is there as a whole or not at all."""
    for step in steps:
        hook("before-prune")
        gone = directory / f"{step}{_TEMPORARY}-old"
        os.rename(directory / str(step), gone)
        for path in sorted(gone.iterdir()):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            hook("during-prune")
        gone.rmdir()
        hook("after-prune")


def set_aside(directory: Path, step: int) -> None:
    """Renames a step that does not verify to `<step>.damaged`, where nothing looks for it; replaces an older one."""
    target = directory / f"{step}{_DAMAGED}"
    if target.exists():
        shutil.rmtree(target)
    os.rename(directory / str(step), target)
    sync_folder(directory)


def delete_leftovers(directory: Path) -> None:
    """Deletes what interrupted saves and deletions have left under temporary names."""
    for path in directory.iterdir():
        if _TEMPORARY in path.name and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
