"""A run with a fault in it: python experiments/faults/victim.py FAULT STEP DELAY train CONFIG.py --out RUN ...

What follows DELAY is given to jentropy's command line. The fault strikes at the rollout STEP of this process, DELAY
seconds after the place it is named after: `compile` (the programs of a stage are being compiled), `sample`, `update`,
`save` send SIGTERM, and the time of it goes to standard error; `hang` never returns from a rollout's graders; `vanish`
removes the run's checkpoints; `full` limits files to DELAY bytes, as a full disk would; `none` does nothing.
"""

import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jentropy import cli
from jentropy.train import loop, stepper

PLACES = {"compile": "put_prompts", "sample": "put_prompts", "update": "grade_on_host"}
"""Functions of the stepper by the fault that strikes after they are called."""


def strike_at(name: str, step: int, strike: Callable[[], None]) -> None:
    """Calls `strike` in the call number `step` of the stepper's function `name`."""
    real, calls = getattr(stepper, name), iter(range(sys.maxsize))

    def struck(*args: Any) -> Any:
        if next(calls) == step:
            strike()
        return real(*args)

    setattr(stepper, name, struck)


def terminate() -> None:
    """Sends SIGTERM to this process and says when."""
    os.write(2, f"\nsignal at {time.time()!r}\n".encode())
    os.kill(os.getpid(), signal.SIGTERM)


def arm(fault: str, step: int, delay: float, out: Path) -> None:
    """Prepares the fault."""
    if fault in PLACES:
        strike_at(PLACES[fault], step, lambda: threading.Timer(delay, terminate).start())
    elif fault == "save":
        real, calls = loop.Run._save, iter(range(sys.maxsize))

        def save(self: loop.Run, *args: Any) -> None:
            if next(calls) == step:
                threading.Timer(delay, terminate).start()
            real(self, *args)

        loop.Run._save = save
    elif fault == "hang":
        strike_at("grade_on_host", step, threading.Event().wait)
    elif fault == "vanish":
        strike_at("grade_on_host", step, lambda: shutil.rmtree(out / "checkpoints"))
    elif fault == "full":
        limit = (int(delay), resource.RLIM_INFINITY)
        strike_at("grade_on_host", step, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    elif fault != "none":
        raise ValueError(f"no such fault: {fault}")


if __name__ == "__main__":
    arm(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), Path(sys.argv[sys.argv.index("--out") + 1]))
    sys.exit(cli.main(sys.argv[4:]))
