"""What processes of the pool do in its tests: nothing that takes time."""

import importlib
import os
from typing import Any

run_pool = importlib.import_module("run_pool")


def work(task: Any) -> Any:
    """Says in `done.txt` which process it was and what its flags were; or fails, or dies, as the run is named."""
    if "dies" in task.config.name:
        os._exit(9)
    if "fails" in task.config.name:
        return run_pool.Failure("ValueError", "as it was told", lasting=False)
    task.out.mkdir()
    (task.out / "done.txt").write_text(f"{os.getpid()} {os.environ['XLA_FLAGS']}", encoding="utf-8")
    return None
