"""Python functions as graders: named by themselves or by their place, in worker processes or in this one."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path

from jentropy import base
from jentropy.rewards import worker_main
from jentropy.rewards.base import TextReward
from jentropy.rewards.workers import WorkerGrader

_load = functools.lru_cache(worker_main.load)


def target_of(function: Callable | str) -> str:
    """The `target` under which a worker finds a function.

    Args:
      function: a function of a module, or "path/to/file.py:name", or "package.module:name".

    Raises:
      ValueError: a lambda, a local function, or a file that does not exist.
    """
    if isinstance(function, str):
        place, colon, name = function.rpartition(":")
        base.require(bool(colon and place and name), "function", function, "path/to/file.py:name or module:name")
        if not place.endswith(".py"):
            return function
        path = Path(place).expanduser().resolve()
        base.require(path.is_file(), "function", function, "in a file that exists")
        return f"{path}:{name}"
    name, module = getattr(function, "__qualname__", "<"), getattr(function, "__module__", None)
    base.require(module is not None and "<" not in name, "function", function, "a function of a module")
    if module is not None and "." in module:
        return f"{module}:{name}"
    return f"{Path(inspect.getfile(function)).resolve()}:{name}"  # of a script or a config: not importable by name


def text_reward(
    function: Callable | str, *, weight: float = 1.0, name: str | None = None, num_workers: int = 2,
    deadline: float = 10.0, memory_mib: int | None = 4096, max_failed: float = 0.5,
) -> TextReward:  # fmt: skip
    """A Python function as a grader in worker processes.

    Args:
      function: `(prompts, completions, **fields) -> one number or None per row`; a function of a module, or the text
        "path/to/file.py:name" or "package.module:name".
      weight: factor of this reward in the sum of all.
      name: what reports call it; None for the function's own.
      num_workers: processes; 0 calls the function in this process, without protection.
      deadline: seconds for one call.
      memory_mib: address space of a worker, MiB; None is unlimited.
      max_failed: largest fraction of a batch's rows that may fail; more is an error.

    Raises:
      ValueError: no such file, no function of a module, or a number out of range.
    """
    base.require(num_workers >= 0, "num_workers", num_workers, "non-negative")
    target = target_of(function)
    name = name or target.rpartition(":")[2]
    if num_workers == 0:
        return TextReward(name, LocalGrader(target) if isinstance(function, str) else function, weight)
    grader = WorkerGrader(
        target=target, deadline=deadline, num_workers=num_workers, memory_mib=memory_mib, max_failed=max_failed
    )
    return TextReward(name, grader, weight)


@dataclasses.dataclass(frozen=True)
class LocalGrader:
    """A grader named by its place and called in this process. A value, hashable.

    Attributes:
      target: `package.module:name` or `/path/to/file.py:name`.
    """

    target: str

    def __call__(self, prompts: list[str], completions: list[str], **fields: list) -> Sequence[float | None]:
        """What the function returns."""
        return _load(self.target)(prompts, completions, **fields)
