"""Rows F2, F4 and F5 of the fault matrix: processes killed inside a save, and damaged files of a checkpoint.

Command: python experiments/faults/checkpoints.py --trials 200 --kills 5 --random-kills 50

Prints one line of a Markdown table per fault and returns 1 if any trial failed. `--trials` damages are made of each
kind (a flipped bit, a file cut off, 4 KiB of zeros, a deleted file), in files of every class in turn; a trial fails if
the damaged step is still taken. At each of the named points in a save `--kills` processes are killed, and
`--random-kills` more at a random moment of saving without pause; a trial fails if the newest step that verifies is
older than one whose save had returned, if its content is wrong, or if the next save fails.
"""

import argparse
import logging
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from jentropy.train.checkpoint import Checkpoints
from jentropy.train.commit import POINTS

KEEP = 2


def make_state(step: int) -> dict[str, np.ndarray]:
    """A state of 200 kB that the number of the step determines; compressible and not."""
    noise = np.random.default_rng(step).normal(size=40_000).astype(np.float32)
    return {"noise": noise, "constant": np.full((10_000,), step, np.float32)}


def flip(path: Path, rng: random.Random) -> None:
    """Flips one bit."""
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, rng: random.Random) -> None:
    """Cuts the file off at a random place."""
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def zero(path: Path, rng: random.Random) -> None:
    """Writes zeros over 4 KiB, or over the whole file if it is shorter."""
    data = path.read_bytes()
    start = rng.randrange(max(1, len(data) - 4096))
    path.write_bytes(data[:start] + bytes(len(data[start : start + 4096])) + data[start + 4096 :])


def delete(path: Path, rng: random.Random) -> None:
    """Deletes the file."""
    del rng
    path.unlink()


def classes(step: Path) -> list[list[Path]]:
    """The files of a step, by kind: names that are hashes are one kind per folder."""
    found: dict[str, list[Path]] = {}
    for path in sorted(step.rglob("*")):
        if path.is_file():
            kind = re.sub(r"[0-9a-f]{32}", "hash", path.relative_to(step).as_posix())
            found.setdefault(kind, []).append(path)
    return list(found.values())


def damage_trials(damage: Callable[[Path, random.Random], None], trials: int, rng: random.Random) -> tuple[int, int]:
    """Damages the newer of two steps; returns how often a byte changed, and how often the step was taken even so."""
    tried = silent = 0
    with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step), {})
        kinds = classes(Path(folder) / "2")
        for trial in range(trials):
            path = rng.choice(kinds[trial % len(kinds)])
            data = path.read_bytes()
            damage(path, rng)
            changed = not path.exists() or path.read_bytes() != data
            tried += changed
            silent += changed and checkpoints.latest_step() != 1
            path.write_bytes(data)
        assert checkpoints.latest_step() == 2
    return tried, silent


def child(folder: str, point: str) -> None:
    """Saves steps without pause, prints each when its save has returned, and dies at `point` of the fourth."""
    armed = False

    def hook(name: str) -> None:
        if armed and name == point:
            os.kill(os.getpid(), signal.SIGKILL)

    with Checkpoints(folder, max_to_keep=KEEP, hook=hook) as checkpoints:
        step = 0
        while True:
            step += 1
            armed = step == KEEP + 2
            checkpoints.save(step, make_state(step), {"step": step})
            print(step, flush=True)


def killed_well(point: str, delay: float) -> bool:
    """Whether the checkpoints are right after a kill at `point`, or `delay` seconds after the first save."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--child", folder, point]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout is not None
            lines = [process.stdout.readline()]
            if not point:
                time.sleep(delay)
                process.kill()
            lines += process.stdout.readlines()
        returned = int([line for line in lines if line.endswith("\n")][-1])
        with Checkpoints(folder, max_to_keep=KEEP, strict=True) as checkpoints:
            newest = checkpoints.latest_step()
            if process.returncode != -signal.SIGKILL or newest not in (returned, returned + 1):
                return False
            for step in (newest, newest + 1):
                if step > newest:
                    checkpoints.save(step, make_state(step), {"step": step})
                state, metadata = checkpoints.restore(step, make_state(0))
                expected = make_state(step)
                if metadata != {"step": step} or any(
                    state[name].tobytes() != expected[name].tobytes() for name in state
                ):
                    return False
            return {path.name for path in Path(folder).iterdir()} == {str(newest), str(newest + 1)}


def rows(args: argparse.Namespace) -> Iterator[tuple[str, int, int]]:
    """What was tried: fault, number of trials, number of failures."""
    rng = random.Random(args.seed)
    for damage in (flip, truncate, zero, delete):
        yield (
            f"{'F4' if damage is flip else 'F5'} {damage.__name__} in every kind of file",
            *damage_trials(damage, args.trials, rng),
        )
    for point in POINTS if args.kills else ():
        yield f"F2 kill -9 {point}", args.kills, sum(not killed_well(point, 0.0) for _ in range(args.kills))
    failed = sum(not killed_well("", rng.uniform(0.0, 2.0)) for _ in range(args.random_kills))
    yield "F2 kill -9 at a random moment of saving", args.random_kills, failed


def main() -> int:
    """Runs the trials; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=200, help="damages of each kind")
    parser.add_argument("--kills", type=int, default=5, help="processes killed at each named point")
    parser.add_argument("--random-kills", type=int, default=50, help="processes killed at a random moment")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", nargs=2, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    if args.child is not None:
        child(*args.child)
    failures = 0
    print("| fault | trials | failed |\n|---|---|---|")
    for name, tried, failed in rows(args):
        failures += failed
        print(f"| {name} | {tried} | {failed} |", flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
