"""Rows F1, F6 to F9, F11, F14, F25 and F27 of the fault matrix: whole runs that are killed, stopped, doubled, starved.

Command: python experiments/faults/runs.py --scale 1

Prints one line of a Markdown table per fault and returns 1 if any trial failed. Every trial is a run of `tiny_run.py`
in processes of its own, compared with one that nothing happened to: equal means that `metrics.jsonl` is equal byte
for byte and so is every array of the newest checkpoint. `--scale` multiplies the numbers of trials.

F1: kill -9 at a moment drawn from the whole time of a run (imports, compilation, warm start, rollouts, evaluations,
checkpoints), then a resume; half of them have the start of a line appended to the metrics before it (F25). Three
kills: the resumed run is killed too, twice. F8: SIGTERM while programs are compiled (with an empty cache of
programs), while a rollout is sampled, an update computed or a checkpoint written; a trial fails if the exit code is
not 75, if it comes more than 30 seconds after the signal, if no checkpoint is there or the resumed run is not equal.
F9: two processes start on one folder at once; a trial fails unless one exits with 73 and names the other, which goes
on. All starts are on the same folder, so each finds the lock of a process that was killed. Two runs in two folders
that make one warm start at once must both equal the reference. F6: files may not grow any more in the middle of the
run; F7: its checkpoints vanish; a trial fails unless the exit code says so (74) and, for F6, the resumed run is
equal. F11: stopped and resumed with other numbers of devices; fails if a metric of the next ten rollouts differs by
more than 1e-3 of its size (the rollouts themselves must be the same). F14: a NaN or an infinity in gradient or loss
of one update; fails unless one update is lost, its batch stored and all lines before it equal. F27: a grader that
never returns; fails unless the exit code is 77 and the stacks name it.
"""

import argparse
import concurrent.futures
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from jentropy import config as config_lib
from jentropy.policy.transformer import transformer
from jentropy.train import manifest
from jentropy.train.checkpoint import Checkpoints
from jentropy.train.lock import LockedError
from jentropy.train.metrics import read_metrics
from jentropy.train.quarantine import SKIPPED, stored_steps
from jentropy.train.sharding import MeshShape, make_mesh
from jentropy.train.stepper import state_template

HERE = Path(__file__).resolve().parent
CONFIG, POISONED = HERE / "tiny_run.py", HERE / "poisoned_run.py"
NOTICE = 30.0
"""Seconds between SIGTERM and the end of the process."""


class Runs:
    """Starts runs in folders below `base`, with datasets, warm starts and programs of their own, and with `env`."""

    def __init__(self, base: Path, **env: str) -> None:
        self.base = base
        path = os.pathsep.join([str(HERE), str(HERE.parents[1] / "tests"), str(HERE.parents[1])])
        self.env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path, "XLA_FLAGS": ""}
        self.env |= {"JENTROPY_DATA": str(base / "data"), "JENTROPY_CACHE": str(base / "cache"), **env}
        self.reference = base / "reference"
        self.run(self.reference)  # prepares the data and fills the caches
        shutil.rmtree(self.reference)
        began = time.monotonic()
        self.run(self.reference)
        self.seconds = time.monotonic() - began
        self._template = None

    def start(
        self, out: Path, *options: str, fault: str = "none", step: int = 0, delay: float = 0.0,
        config: Path = CONFIG, **env: str,
    ) -> subprocess.Popen[str]:  # fmt: skip
        """A process that begins the run in `out`, or goes on with it."""
        victim = [sys.executable, str(HERE / "victim.py"), fault, str(step), str(delay)]
        resume = ["--resume"] if (out / "metrics.jsonl").exists() else []
        command = [*victim, "train", str(config), "--out", str(out), *resume, *options]
        return subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**self.env, **env},
            start_new_session=True,
        )  # fmt: skip

    def run(self, out: Path, *options: str, expect: int = 0, **settings) -> str:
        """Runs to the end; returns what was written to standard error."""
        process = self.start(out, *options, **settings)
        _, err = process.communicate()
        if process.returncode != expect:
            raise TrialError(f"exit code {process.returncode} where {expect} was due: {err[-600:]}")
        return err

    def arrays(self, out: Path) -> dict[str, bytes]:
        """The bytes of all leaves of the newest checkpoint, by path."""
        import jax

        if self._template is None:
            experiment = config_lib.build(config_lib.load_config(CONFIG))
            mesh = make_mesh(MeshShape(), 1)
            self._template = state_template(experiment, transformer(experiment.policy), mesh, 2)
        with Checkpoints(out / "checkpoints", strict=True) as checkpoints:
            state, _ = checkpoints.restore(None, self._template)
        state = state.replace(key=jax.random.key_data(state.key))
        leaves = jax.tree_util.tree_leaves_with_path(state)
        return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}

    def must_equal_reference(self, out: Path) -> None:
        """Raises unless the finished run in `out` is the reference, byte for byte."""
        if (out / "metrics.jsonl").read_bytes() != (self.reference / "metrics.jsonl").read_bytes():
            raise TrialError("metrics.jsonl differs")
        if self.arrays(out) != self.arrays(self.reference):
            raise TrialError("the newest checkpoint differs")


class TrialError(Exception):
    """A trial that failed, and why."""


def kill_after(runs: Runs, out: Path, seconds: float) -> None:
    """Begins or resumes the run in `out` and kills it."""
    process = runs.start(out)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def killed(runs: Runs, out: Path, rng: random.Random, *, kills: int = 1, torn: bool = False) -> None:
    """F1 and F25."""
    for _ in range(kills):
        kill_after(runs, out, rng.uniform(0.0, runs.seconds))
    metrics = out / "metrics.jsonl"
    if torn and metrics.exists():
        line = (runs.reference / "metrics.jsonl").read_bytes().splitlines()[0]
        with metrics.open("ab") as file:
            file.write(line[: rng.randrange(1, len(line))])
    runs.run(out)
    runs.must_equal_reference(out)


def terminated(runs: Runs, out: Path, rng: random.Random, *, fault: str) -> float:
    """F8; returns the seconds from the signal to the end of the process."""
    cold = {"JAX_COMPILATION_CACHE_DIR": str(out) + "-programs"} if fault == "compile" else {}
    step = {"compile": 0, "save": rng.randrange(0, 6)}.get(fault, rng.randrange(3, 36))
    process = runs.start(out, fault=fault, step=step, delay=rng.uniform(0.0, 2.0 if cold else 0.02), **cold)
    _, err = process.communicate()
    ended, sent = time.time(), re.search(r"signal at ([\d.]+)", err)
    if process.returncode != 75 or sent is None:
        raise TrialError(f"exit code {process.returncode}: {err[-600:]}")
    seconds = ended - float(sent[1])
    if seconds > NOTICE:
        raise TrialError(f"{seconds:.1f} s")
    steps = sorted(int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdigit())
    if not steps or manifest.verify(out / "checkpoints" / str(steps[-1])):
        raise TrialError("no checkpoint")
    runs.run(out)
    runs.must_equal_reference(out)
    return seconds


def doubled(runs: Runs, out: Path, rng: random.Random) -> None:
    """F9, at intervals of up to 50 ms."""
    first = runs.start(out)
    time.sleep(rng.uniform(0.0, 0.05))
    pair = [first, runs.start(out)]
    try:
        deadline = time.monotonic() + 120
        while all(process.poll() is None for process in pair) and time.monotonic() < deadline:
            time.sleep(0.01)
        loser = next((process for process in pair if process.poll() is not None), None)
        if loser is None:
            raise TrialError("both run")
        winner = pair[pair[0] is loser]
        time.sleep(0.3)
        err = loser.stderr.read()
        if loser.returncode != LockedError.exit_code or f"process {winner.pid}" not in err:
            raise TrialError(f"the loser: exit code {loser.returncode}: {err[-300:]}")
        if winner.poll() is not None:
            raise TrialError("none runs")
    finally:
        for process in pair:
            process.kill()
            process.wait()
            process.stderr.close()


def shared(runs: Runs, out: Path, rng: random.Random) -> None:
    """Two runs that need the same warm start at once."""
    env = {"JENTROPY_CACHE": f"{out}-cache", "JAX_COMPILATION_CACHE_DIR": str(runs.base / "cache" / "xla")}
    folders = [out.with_name(f"{out.name}-{name}") for name in "ab"]
    first = runs.start(folders[0], **env)
    time.sleep(rng.uniform(0.0, 0.1))
    for process, folder in zip([first, runs.start(folders[1], **env)], folders):
        err = process.communicate()[1]
        if process.returncode != 0:
            raise TrialError(f"exit code {process.returncode}: {err[-600:]}")
        runs.must_equal_reference(folder)


def starved(runs: Runs, out: Path, rng: random.Random) -> None:
    """F6."""
    err = runs.run(out, fault="full", step=rng.randrange(3, 36), delay=float(rng.randrange(0, 20_000)), expect=74)
    noise, said, rest = err.rpartition("jentropy: ")  # threads of TensorStore print before it
    if not said or "Traceback" in rest:
        raise TrialError(f"no clear message at the end: {noise[-300:]}{rest[-300:]}")
    runs.run(out)
    runs.must_equal_reference(out)


def robbed(runs: Runs, out: Path, rng: random.Random) -> None:
    """F7."""
    err = runs.run(out, fault="vanish", step=rng.randrange(3, 36), expect=74)
    if "Traceback" in err or "checkpoints" not in err:
        raise TrialError(f"no clear message: {err[-600:]}")


def moved(runs: Runs, out: Path, rng: random.Random, *, devices: tuple[int, int]) -> None:
    """F11."""
    flags = [f"--xla_force_host_platform_device_count={number}" for number in devices]
    meshes = [("--set", f"mesh.data={number}") for number in devices]
    rollout = rng.randrange(6, 16)
    runs.run(out, *meshes[0], fault="update", step=rollout, expect=75, XLA_FLAGS=flags[0])
    unmoved = shutil.copytree(out, out.with_name(out.name + "-unmoved"))
    runs.run(unmoved, *meshes[0], XLA_FLAGS=flags[0])
    runs.run(out, *meshes[1], "--allow-change", XLA_FLAGS=flags[1])
    a, b = (read_metrics(folder / "metrics.jsonl") for folder in (out, unmoved))
    for one, other in zip(a, b):
        for name in ("critic/score/mean", "response_length/mean", "actor/entropy", "actor/loss", "actor/grad_norm"):
            if name in one and one["step"] < rollout + 10 and not math.isclose(
                one[name], other[name], rel_tol=1e-3, abs_tol=1e-5
            ):  # fmt: skip
                raise TrialError(f"step {one['step']}: {name} {one[name]} / {other[name]}")


def poisoned(runs: Runs, out: Path, rng: random.Random, *, where: str, value: str) -> None:
    """F14."""
    healthy = runs.base / "healthy"
    step, update = rng.randrange(3, 36), rng.randrange(4)
    path = "stages.1.objective.mechanisms.poison"
    settings = {"step": step, "update_index": update, "where": where, "value": value}
    options = [text for name, item in settings.items() for text in ("--set", f"{path}.{name}={item}")]
    runs.run(out, *options, config=POISONED)
    lines, expected = (read_metrics(folder / "metrics.jsonl") for folder in (out, healthy))
    lost = {line["step"]: line[SKIPPED] * 4 for line in lines if line.get(SKIPPED)}
    if lost != {step: 1.0} or stored_steps(out / "quarantine") != [step]:
        raise TrialError(f"lost {lost}, stored {stored_steps(out / 'quarantine')}, struck {step}")
    before = [line for line in expected if line["step"] < step]
    if lines[: len(before)] != before or any(
        isinstance(x, float) and not math.isfinite(x) for line in lines if line["step"] != step for x in line.values()
    ):
        raise TrialError("other lines than that of the struck rollout differ or are not finite")


def hung(runs: Runs, out: Path, rng: random.Random) -> None:
    """F27."""
    runs.run(out, "--set", "hang_limit=20.0", fault="hang", step=rng.randrange(3, 36), expect=77)
    if "grade_on_host" not in (out / "stacks.txt").read_text() and "wait" not in (out / "stacks.txt").read_text():
        raise TrialError("the stacks do not name the function")


def trials(
    runs: Runs, name: str, trial: Callable[..., float | None], number: int, seed: int, **settings
) -> list[float]:
    """Runs trials on both cores; returns their figures, NaN for those that failed, which are printed."""

    def one(index: int) -> float:
        out = runs.base / f"{name}-{index}"
        try:
            found = trial(runs, out, random.Random(f"{seed} {name} {index}"), **settings)
        except (TrialError, OSError) as error:
            print(f"{name}, trial {index}: {error}", file=sys.stderr, flush=True)
            return math.nan
        for folder in runs.base.glob(f"{name}-{index}*"):
            shutil.rmtree(folder)
        return found or 0.0

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, range(number)))


def rows(runs: Runs, scale: float, seed: int, only: str) -> Iterator[tuple[str, str, list[float]]]:
    """(fault, unit of its figure or "", figures of the trials) of every row."""

    def row(title: str, name: str, trial, number: int, unit: str = "", **settings) -> tuple[str, str, list[float]]:
        number = max(1, round(number * scale)) if title.startswith(only) else 0
        return title, unit, trials(runs, name, trial, number, seed, **settings)

    yield row("F1 kill -9 at a random moment, resume equal", "kill", killed, 25)
    yield row("F1, F25 the same with a torn line of metrics", "torn", killed, 25, torn=True)
    yield row("F1 three kills in a row", "kills", killed, 5, kills=3)
    for fault in ("compile", "sample", "update", "save"):
        title = f"F8 SIGTERM during {fault}, resume equal"
        yield row(title, f"term-{fault}", terminated, 5, "s to exit code 75", fault=fault)
    number = max(1, round(50 * scale)) if "F9".startswith(only) else 0
    yield "F9 two starts, exactly one survives", "", doubles(runs, number, seed)
    yield row("two runs make one warm start at once, both equal", "shared", shared, 10)
    yield row("F6 no room for files, resume equal", "full", starved, 20)
    yield row("F7 checkpoints vanish", "vanish", robbed, 10)
    for devices in ((8, 1), (1, 8)):
        yield row(f"F11 stopped on {devices[0]}, resumed on {devices[1]} devices", f"mesh{devices[0]}", moved, 3,
                  devices=devices)  # fmt: skip
    if "F14".startswith(only):
        runs.run(runs.base / "healthy", config=POISONED)
    for where, value in (("gradient", "nan"), ("gradient", "inf"), ("loss", "nan"), ("loss", "inf")):
        title = f"F14 {value} in the {where} of one update"
        yield row(title, f"{where}-{value}", poisoned, 5, where=where, value=value)
    yield row("F27 a grader that never returns", "hang", hung, 5)


def doubles(runs: Runs, number: int, seed: int) -> list[float]:
    """F9: one start after the other, all on one folder."""
    out, found = runs.base / "double", []
    for index in range(number):
        try:
            doubled(runs, out, random.Random(f"{seed} double {index}"))
            found.append(0.0)
        except TrialError as error:
            print(f"double, trial {index}: {error}", file=sys.stderr, flush=True)
            found.append(math.nan)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the trials; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scale", type=float, default=1.0, help="times the number of trials in the matrix")
    parser.add_argument("--only", default="", help="rows that begin so, such as F6")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    failures = 0
    print("| fault | trials | failed |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as base:
        for name, unit, figures in rows(Runs(Path(base)), args.scale, args.seed, args.only):
            if not figures:
                continue
            failed = sum(map(math.isnan, figures))
            failures += failed
            worst = f" (at most {np.nanmax(figures):.1f} {unit})" if unit and failed < len(figures) else ""
            print(f"| {name}{worst} | {len(figures)} | {failed} |", flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
