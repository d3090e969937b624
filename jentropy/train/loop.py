"""The loop: stages, evaluations, checkpoints and what a person sees of them. All I/O of training is here."""

import contextlib
import functools
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import fiddle as fdl
import jax
import numpy as np
from jax.sharding import Mesh

from jentropy import config as config_lib
from jentropy.base import Metrics, Policy
from jentropy.policy.transformer import transformer
from jentropy.report.plots import run_plot
from jentropy.rewards import workers
from jentropy.rollout.strategy import PADDED
from jentropy.train.allocator import keep_freed_memory
from jentropy.train.checkpoint import Checkpoints
from jentropy.train.compilations import num_compilations
from jentropy.train.evaluate import Evaluator
from jentropy.train.experiment import Experiment, Reinforce, Supervised
from jentropy.train.folder import open_folder, write_header
from jentropy.train.kept import KeptWriter
from jentropy.train.law_metrics import LawMetrics
from jentropy.train.metrics import MetricsWriter, divide, read_metrics
from jentropy.train.preference_stage import Prefer
from jentropy.train.preflight import check_room, num_bytes
from jentropy.train.programs import EVALUATION, SAMPLING
from jentropy.train.progress import Progress
from jentropy.train.quarantine import Batch, Quarantine, trailing_skips
from jentropy.train.sharding import make_mesh, replicated
from jentropy.train.signals import StopSignals
from jentropy.train.state import TrainState
from jentropy.train.stepper import fresh_state, make_stepper, state_template
from jentropy.train.warm_start import cache_folder, cached_warm_start, init_params, run_supervised
from jentropy.train.watchdog import Watchdog

_WARM = 2
"""Steps of a stage after which nothing may be compiled any more."""


def enable_compilation_cache(folder: Path | None = None) -> None:
    """Keeps compiled programs on disk between processes, unless the user has set a folder for them."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str((folder or cache_folder()) / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def make_evaluator(experiment: Experiment, policy: Policy, mesh: Mesh, num_prompts: int) -> Evaluator:
    """The experiment's evaluation on its first `num_prompts` held-out prompts, at the last stage's temperature."""
    settings, task, last = experiment.evaluation, experiment.task, experiment.stages[-1]
    return Evaluator(
        policy, task, task.prompts("heldout", settings.mixture).fixed(0, num_prompts),
        num_samples=settings.num_samples,
        temperature=last.objective.temperature if isinstance(last, Reinforce) else 1.0,
        batch=experiment.eval_batch, hard_from=settings.hard_from, mesh=mesh,
    )  # fmt: skip


class _Pending(NamedTuple):
    """A step that was dispatched, and whose metrics are still to be fetched."""

    step: int
    metrics: Metrics
    batch: Batch
    began: float


class Run:
    """One run in one folder, which is locked until `close`.

    Args:
      config: a `fdl.Config` of `Experiment`.
      out: the run's folder.
      resume: go on from the newest checkpoint that verifies.
      strict: refuse to fall back to an older checkpoint if the newest does not verify.
      allow_change: resume although fields of the config have changed that need this.
      quiet: no progress bar.
    """

    def __init__(
        self, config: fdl.Config, out: Path, *,
        resume: bool = False, strict: bool = False, allow_change: bool = False, quiet: bool = False,
    ) -> None:  # fmt: skip
        self.config, self.out = config, Path(out)
        self.experiment: Experiment = config_lib.build(config)
        self.experiment.check_mesh()
        self.mesh = make_mesh(self.experiment.mesh)
        self.policy = transformer(self.experiment.policy)
        self.key = jax.device_put(jax.random.key(self.experiment.seed), replicated(self.mesh))
        self._sampling_key, self._eval_key = (jax.random.fold_in(self.key, p) for p in (SAMPLING, EVALUATION))
        self._quiet = quiet
        self._written, self._checked = 0.0, False
        self._evaluator = make_evaluator(
            self.experiment, self.policy, self.mesh, self.experiment.evaluation.num_prompts
        )
        with contextlib.ExitStack() as stack:
            stack.enter_context(open_folder(self.out, resume))
            identity = config_lib.identity(config)
            self._checkpoints = stack.enter_context(
                Checkpoints(self.out / "checkpoints", strict=strict, identity=identity)
            )
            self._resumed = self._checkpoints.latest_metadata() if resume else None
            seed, at = self.experiment.seed, self._resumed
            write_header(
                self.out, config, self.experiment, allow_change=allow_change, stage=at["stage"] if at else None
            )
            self._writer = stack.enter_context(
                MetricsWriter(
                    self.out,
                    resume_offset=(at["metrics_offset"] if at else 0) if resume else None,
                    resume_step=(at["step"] if at else 0) if resume else None,
                )
            )
            lines = read_metrics(self.out / "metrics.jsonl")
            self._quarantine = Quarantine(self.out / "quarantine", seed=seed, in_a_row=trailing_skips(lines))
            self._law = LawMetrics(lines)
            self._kept = KeptWriter(self.out, self.experiment, identity=identity, resume_step=at["step"] if at else 0)
            self._files = stack.pop_all()

    def _put(self, value: int) -> jax.Array:
        return jax.device_put(np.int32(value), replicated(self.mesh))

    def run(self) -> dict[str, Any]:
        """Runs what is left of the stages; returns the last line of metrics, the final evaluation."""
        stages, params, step, total = self.experiment.stages, None, 0, self.experiment.num_steps
        first = self._resumed["stage"] if self._resumed else 0
        with (
            Progress(total, initial=(self._resumed or {"step": 0})["step"], quiet=self._quiet) as self._bar,
            StopSignals() as self._stop,
            Watchdog(self.out / "stacks.txt", limit=self.experiment.hang_limit) as self._watchdog,
        ):
            for index in range(first, len(stages)):
                stage = stages[index]
                if isinstance(stage, Supervised):
                    params = self._supervise(index, stage, params)
                else:
                    state = self._train(index, stage, params, step)
                    params, step = state.params, int(jax.device_get(state.step))
            return self._finish(params, step)

    def close(self) -> None:
        """Closes the run's files and its graders, and releases its folder."""
        workers.close_all()
        self._files.close()

    def _supervise(self, index: int, stage: Supervised, params: Any) -> Any:
        task = self.experiment.task

        def report(step: int, loss: float) -> None:
            self._bar.note(f"{stage.name} {step}/{stage.steps}: loss {loss:.3f} nats")
            self._watchdog.beat(stage.name)
            self._stop.check(0)

        def train(start: Any) -> Any:
            return run_supervised(stage, self.policy, task, start, self.mesh, report)

        if index > 0:
            return train(params)
        params, cached = cached_warm_start(
            self.config, self.policy, self.mesh, lambda: train(init_params(self.policy, stage.seed, self.mesh))
        )
        self._bar.note(f"{stage.name}: {'from the cache' if cached else 'done'}")
        return params

    def _start_stage(self, index: int, params: Any, step: int) -> TrainState:
        """The state at the start of the stage, or where the checkpoint left it."""
        template = state_template(self.experiment, self.policy, self.mesh, index)
        if self._resumed is not None and self._resumed["stage"] == index:
            return self._checkpoints.restore(self._resumed["step"], template)[0]
        if params is None:
            params = init_params(self.policy, self.experiment.seed, self.mesh)
        fresh = functools.partial(fresh_state, self.experiment, index)
        start = jax.jit(fresh, out_shardings=jax.tree.map(lambda x: x.sharding, template))
        return start(params, self._put(step), self.key)

    def _train(self, index: int, stage: Reinforce | Prefer, params: Any, step: int) -> TrainState:
        """Runs one stage of reinforcement learning, or of preferences, from `step` rollouts on."""
        state = self._start_stage(index, params, step)
        check_room(self.out, num_bytes(state))
        done = self._resumed["stage_step"] if self._resumed and self._resumed["stage"] == index else 0
        start = int(jax.device_get(state.step)) - done
        stepper = make_stepper(self.experiment, stage, self.policy, self.mesh, self._sampling_key)
        pending, compiled = None, 0
        with jax.transfer_guard("disallow"):
            for n in range(done, stage.steps):
                if n == done or n % self.experiment.evaluation.every == 0:
                    pending = self._write(stage, pending)
                    offset = self._writer.offset()
                    self._evaluate(stage, state.params, start + n, write=n % self.experiment.evaluation.every == 0)
                    if self._stop.requested:  # the next step may have to be compiled first
                        if start + n not in self._checkpoints.all_steps():
                            self._save(index, n, state, offset)
                        self._stop.check(start + n)
                began = time.perf_counter()
                self._watchdog.beat()
                keep = self._kept.is_due(start + n)
                if keep:
                    compiled += self._kept.save_state(start + n, index, n, state)
                state, metrics, batch = stepper(state, start + n)
                if keep:
                    self._kept.save_rollouts(start + n, index, batch)
                self._write(stage, pending)
                pending = _Pending(start + n, metrics, batch, began)
                if n - done < _WARM:
                    pending = self._write(stage, pending)
                    compiled = num_compilations()
                elif num_compilations() != compiled:
                    more = num_compilations() - compiled
                    raise RuntimeError(f"step {start + n}: {more} compilations after the warm-up")
                if (n + 1) % self.experiment.checkpoint_every == 0 or n + 1 == stage.steps or self._stop.requested:
                    pending = self._write(stage, pending)
                    self._save(index, n + 1, state)
                    self._stop.check(start + n + 1)
                    compiled = num_compilations()
        return state

    def _evaluate(self, stage: Reinforce | Prefer, params: Any, step: int, *, write: bool) -> None:
        """Evaluates on held-out prompts; without `write` only to have the program compiled."""
        self._watchdog.beat("evaluation")
        metrics = self._evaluator(params, self._eval_key, step)
        if write:
            self._writer.write(step, self._law(step, {"stage": stage.name, **metrics}))

    def _write(self, stage: Reinforce | Prefer, pending: _Pending | None) -> None:
        """Fetches and writes the metrics of a step that was dispatched before; returns None, nothing is pending."""
        if pending is None:
            return
        metrics = divide(pending.metrics)
        if not self._checked and isinstance(stage, Reinforce):
            if metrics["sampler/logp_diff_relative"] > self.experiment.sampler_tolerance:
                raise RuntimeError(
                    "sampler and trainer disagree on log-probabilities by "
                    f"{metrics['sampler/logp_diff_max']:.2e} nats, "
                    f"more than sampler_tolerance = {self.experiment.sampler_tolerance:.2e} times max(1, their size)"
                )
            self._checked = True
        for name, value in metrics.items():
            if name.startswith("error/") and value != 0:
                raise ValueError(f"step {pending.step}: {name.removeprefix('error/')}: {value:g}")
        now = time.perf_counter()
        seconds, self._written = now - max(pending.began, self._written), now
        padded = metrics.get("dynamic/padded_fraction", metrics.get(PADDED, 0.0))
        rows = stage.num_rows * (1.0 - padded)
        tokens = metrics.get("response_length/mean", 0.0) * rows
        self._writer.write(pending.step, {"stage": stage.name, **metrics})
        timing = {"seconds": seconds, "tokens": tokens, "compilations": num_compilations()}
        timing |= {f"reward_rows/{name}": count for name, count in workers.counters().items()}
        self._writer.write_timing(pending.step, timing)
        reward = metrics.get("critic/score/mean", math.nan)  # every grader may have abstained
        self._bar.update(pending.step + 1, reward=reward, entropy=metrics.get("actor/entropy", math.nan))
        self._quarantine.observe(pending.step, stage.name, metrics, pending.batch)

    def _save(self, index: int, stage_step: int, state: TrainState, offset: int | None = None) -> None:
        """Commits a checkpoint; a run resumed from it goes on after `offset` bytes of metrics, by default all."""
        self._watchdog.beat("checkpoint")
        step = int(jax.device_get(state.step))
        metadata = {
            "stage": index, "stage_step": stage_step, "step": step,
            "metrics_offset": self._writer.offset() if offset is None else offset,
        }  # fmt: skip
        self._checkpoints.save(step, state, metadata)

    def _finish(self, params: Any, step: int) -> dict[str, Any]:
        """The final evaluation, greedy decoding included, and the plot."""
        num_prompts = self.experiment.evaluation.final_num_prompts
        final = make_evaluator(self.experiment, self.policy, self.mesh, num_prompts)
        name = self.experiment.stages[-1].name
        line = self._law(step, {"stage": name, "final": True, **final(params, self._eval_key, step, greedy=True)})
        self._writer.write(step, line)
        run_plot(read_metrics(self.out / "metrics.jsonl"), self.out / "plot.png", self.experiment.name)
        return {"step": step, **line}


def evaluate_run(out: Path, config: fdl.Config | None = None) -> dict[str, Any]:
    """Evaluates the newest checkpoint of the run in `out`, as at its end; writes `eval.json` there.

    Args:
      out: the run's folder.
      config: the run's config, if it uses functions that are not jentropy's; else that in the folder.

    Raises:
      FileNotFoundError: no run, or no checkpoint, in `out`.
    """
    enable_compilation_cache()
    out = Path(out)
    if not (out / "config.json").exists():
        raise FileNotFoundError(f"{out} holds no run: no config.json")
    experiment: Experiment = config_lib.build(config or config_lib.load(out / "config.json"))
    policy, mesh = transformer(experiment.policy), make_mesh(experiment.mesh)
    key = jax.device_put(jax.random.key(experiment.seed), replicated(mesh))
    with Checkpoints(out / "checkpoints") as checkpoints:
        metadata = checkpoints.latest_metadata()
        if metadata is None:
            raise FileNotFoundError(f"{out} has no checkpoint")
        state = checkpoints.restore(metadata["step"], state_template(experiment, policy, mesh, metadata["stage"]))[0]
    evaluator = make_evaluator(experiment, policy, mesh, experiment.evaluation.final_num_prompts)
    found = evaluator(state.params, jax.random.fold_in(key, EVALUATION), metadata["step"], greedy=True)
    line = {"step": metadata["step"], **found}
    (out / "eval.json").write_text(json.dumps(line, indent=1) + "\n", encoding="utf-8")
    return line


def train(
    config: fdl.Config, out: Path, *,
    resume: bool = False, strict: bool = False, allow_change: bool = False, quiet: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Runs an experiment config in a folder; returns its final metrics. See `Run`."""
    enable_compilation_cache()
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    options = {"resume": resume, "strict": strict, "allow_change": allow_change, "quiet": quiet}
    with contextlib.closing(Run(config, out, **options)) as run:
        return run.run()
