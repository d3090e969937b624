"""Rows F18 to F20, F28 and F30 of the fault matrix: broken graders, killed workers, damaged data.

Command: python experiments/faults/graders.py --kinds 10 --rows 300 --kills 100 --flips 200 --starts 200

Prints one line of a Markdown table per fault and returns 1 if any trial failed. F18: each of nine kinds of broken
function, `--kinds` times; a trial fails if the error does not name function and row, or if a row that raises costs
more than itself. F19: `--rows` rows that hang, spin, crash, leave, print or eat memory, among good ones; a trial fails
if the row has a reward, if a good row beside it has none, if the batch takes more than a deadline and a second per
broken row and call, or if a process is left. F20: a worker is killed while it grades; a trial fails if more than one
row is lost. F28: a bit is flipped in a prepared dataset; a trial fails if it is read even so. F30: workers start after
JAX has compiled and run a program; a trial fails if one does not answer.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

from jentropy.data import jsonl
from jentropy.rewards.base import RewardError
from jentropy.rewards.workers import Graded, Pool, WorkerGrader

BROKEN = Path(__file__).resolve().parents[2] / "tests" / "rewards" / "broken_graders.py"
ERRORS = {
    "wrong_length": "values for 4 rows",
    "not_a_list": "must return a list, got float",
    "wrong_type": "returned str '1' for row 1",
    "not_a_number": "returned nan for row 3",
    "infinite": "returned -inf for row 0",
    "huge": "returned 1e+39 for row 0",
    "huge_integer": "returned inf for row 0",
    "absent": "cannot be loaded",
}
TEXTS = ("hang", "spin", "crash", "exit", "segfault", "print", "error", "memory")
DEADLINE = 0.3


def make_pool(name: str, num_workers: int = 2) -> Pool:
    """Workers for one of the broken graders."""
    return Pool(WorkerGrader(target=f"{BROKEN}:{name}", deadline=DEADLINE, num_workers=num_workers, max_failed=1.0))


def grade(pool: Pool, completions: list[str]) -> Graded:
    """Grades completions of empty prompts."""
    return pool.grade([""] * len(completions), completions, {})


def children() -> list[int]:
    """Processes that this one has started and that are not dead."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == os.getpid() and state not in "ZX":
            found.append(int(path.parent.name))
    return found


def names_its_fault(name: str) -> bool:
    """F18: whether the error of a broken function names it and what it returned."""
    pool = make_pool(name, num_workers=1)
    try:
        grade(pool, ["0", "1", "2", "3"])
    except RewardError as error:
        return f":{name}'" in str(error) and ERRORS[name] in str(error)
    finally:
        pool.close()
    return False


def costs_itself(pool: Pool, texts: list[str]) -> int:
    """F19: how many of the broken rows, one good row after each, are not dealt with as they should be."""
    began = time.monotonic()
    graded = grade(pool, [item for text in texts for item in (text, "1")])
    if time.monotonic() - began > (len(texts) + 1) * (DEADLINE + 1.0):
        return len(texts)
    return sum(bool(broken) or not good for broken, good in zip(graded.is_valid[::2], graded.is_valid[1::2]))


def survives_a_kill(pool: Pool, rng: random.Random) -> bool:
    """F20: whether a batch during which a worker is killed keeps all its rows."""
    grade(pool, ["1", "2"])
    victim = rng.choice(children())
    timer = threading.Timer(rng.uniform(0.0, 0.005), os.kill, (victim, signal.SIGKILL))
    timer.start()
    graded = grade(pool, [str(n) for n in range(400)])
    timer.join()
    return int((~graded.is_valid).sum()) <= 1  # at most the one row that was alone when its worker died


def flips_noticed(trials: int, rng: random.Random) -> int:
    """F28: how many of so many flipped bits are seen."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "data.jsonl"
        source.write_text("".join(json.dumps({"prompt": f"{n}", "answer": n}) + "\n" for n in range(500)))
        data = jsonl.prepare(source, data_dir=folder)
        files = sorted(Path(data.folder).iterdir())
        return sum(flip_noticed(rng.choice(files), data.folder, rng) for _ in range(trials))


def flip_noticed(path: Path, folder: str, rng: random.Random) -> bool:
    """Whether one flipped bit in a file is seen; the file is mended."""
    content = path.read_bytes()
    damaged = bytearray(content)
    damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    path.write_bytes(damaged)
    try:
        jsonl.verify(folder)
    except jsonl.CorruptDataError:
        return True
    finally:
        path.write_bytes(content)
    return False


def starts(trials: int) -> int:
    """F30: how many workers do not answer, started after JAX has run."""
    jax.block_until_ready(jax.jit(lambda x: x @ x)(jnp.ones((64, 64))))
    failed = 0
    for _ in range(trials):
        pool = make_pool("by_text", num_workers=1)
        failed += not grade(pool, ["1"]).is_valid.all()
        pool.close()
    return failed


def rows(args: argparse.Namespace, rng: random.Random) -> Iterator[tuple[str, int, int]]:
    """(fault, trials, failed trials) of every row."""
    for name in ERRORS:
        yield f"F18 {name}", args.kinds, sum(not names_its_fault(name) for _ in range(args.kinds))
    pool = make_pool("by_text")
    yield "F18 raises", args.kinds, sum(costs_itself(pool, ["raise"]) for _ in range(args.kinds))
    for text in TEXTS:
        trials = -(-args.rows // len(TEXTS))
        failed = sum(costs_itself(pool, [text] * min(4, trials - start)) for start in range(0, trials, 4))
        yield f"F19 {text}", trials, failed
    yield "F20 kill -9 of a worker", args.kills, sum(not survives_a_kill(pool, rng) for _ in range(args.kills))
    pool.close()
    yield "F28 flipped bit in a prepared dataset", args.flips, args.flips - flips_noticed(args.flips, rng)
    yield "F30 worker started after JAX", args.starts, starts(args.starts)
    yield "F19 processes left", 1, len(children())


def main() -> int:
    """Runs the trials; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kinds", type=int, default=10, help="trials of each kind of broken function")
    parser.add_argument("--rows", type=int, default=300, help="broken rows")
    parser.add_argument("--kills", type=int, default=100, help="killed workers")
    parser.add_argument("--flips", type=int, default=200, help="flipped bits")
    parser.add_argument("--starts", type=int, default=200, help="workers started after JAX")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    failures = 0
    print("| fault | trials | failed |\n|---|---|---|")
    for name, tried, failed in rows(args, random.Random(args.seed)):
        failures += failed
        print(f"| {name} | {tried} | {failed} |", flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
