"""The loop: stages, evaluations, checkpoints and what a person sees of them. All I/O of training is here."""

import functools
import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fiddle as fdl
import jax
import numpy as np
from jax.sharding import Mesh

from jentropy import config as config_lib
from jentropy.base import Policy
from jentropy.policy.transformer import transformer
from jentropy.report.plots import run_plot
from jentropy.rollout.iid import RolloutSpec
from jentropy.train.allocator import keep_freed_memory
from jentropy.train.checkpoint import Checkpoints
from jentropy.train.compilations import num_compilations
from jentropy.train.evaluate import Evaluator, grade_on_host, put_prompts
from jentropy.train.experiment import Experiment, Reinforce, Supervised
from jentropy.train.metrics import MetricsWriter, divide, read_metrics
from jentropy.train.programs import EVALUATION, SAMPLING, make_rollout
from jentropy.train.progress import Progress
from jentropy.train.sharding import make_mesh, replicated
from jentropy.train.state import TrainState, new_stage, state_shardings
from jentropy.train.step import make_spec, make_train_step
from jentropy.train.warm_start import cache_folder, cached_warm_start, init_params, run_supervised

_WARM = 2
"""Steps of a stage after which nothing may be compiled any more."""


def enable_compilation_cache(folder: Path | None = None) -> None:
    """Keeps compiled programs on disk between processes, unless the user has set a folder for them."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str((folder or cache_folder()) / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _commit() -> str | None:
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    found = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def _header(config: fdl.Config, seed: int) -> dict[str, Any]:
    names = ("jentropy", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {
        "identity": config_lib.identity(config),
        "seed": seed,
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
        "backend": jax.default_backend(),
        "devices": jax.device_count(),
    }


def prepare_folder(out: Path, resume: bool) -> None:
    """Creates the run's folder.

    Raises:
      FileExistsError: it holds a run already and `resume` is False.
      FileNotFoundError: `resume` is True and it holds none.
      PermissionError: it cannot be written to.
    """
    started = (out / "metrics.jsonl").exists()
    if started and not resume:
        raise FileExistsError(f"{out} holds a run already: resume it with --resume, or choose another --out")
    if resume and not started:
        raise FileNotFoundError(f"{out} holds no run to resume")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise PermissionError(f"cannot create the run folder {out}: {error}") from error
    if not os.access(out, os.W_OK):
        raise PermissionError(f"the run folder {out} is not writable")


def make_evaluator(experiment: Experiment, policy: Policy, mesh: Mesh, num_prompts: int) -> Evaluator:
    """The experiment's evaluation on its first `num_prompts` held-out prompts, at the last stage's temperature."""
    settings, task, last = experiment.evaluation, experiment.task, experiment.stages[-1]
    return Evaluator(
        policy, task, task.prompts("heldout", settings.mixture).fixed(0, num_prompts),
        num_samples=settings.num_samples,
        temperature=last.objective.temperature if isinstance(last, Reinforce) else 1.0,
        batch=experiment.eval_batch, hard_from=settings.hard_from, mesh=mesh,
    )  # fmt: skip


def _fresh(stage: Reinforce, params: Any, step: jax.Array, key: jax.Array) -> TrainState:
    return new_stage(params, step, key, stage.objective, stage.optimizer, stage.reference)


def state_template(experiment: Experiment, policy: Policy, mesh: Mesh, index: int) -> TrainState:
    """Shapes, dtypes and shardings of the state in a stage of reinforcement learning."""
    stage = experiment.stages[index]
    assert isinstance(stage, Reinforce), f"stage {index} has no training state"
    key = jax.random.key(0)
    shapes = jax.eval_shape(
        functools.partial(_fresh, stage), jax.eval_shape(policy.init, key), jax.ShapeDtypeStruct((), np.int32), key
    )
    shardings = state_shardings(policy, mesh, stage.optimizer, shapes)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


class Run:
    """One run in one folder.

    Args:
      config: a `fdl.Config` of `Experiment`.
      out: the run's folder.
      resume: go on from the newest checkpoint.
      quiet: no progress bar.
    """

    def __init__(self, config: fdl.Config, out: Path, *, resume: bool = False, quiet: bool = False) -> None:
        self.config, self.out = config, Path(out)
        self.experiment: Experiment = config_lib.build(config)
        self.experiment.check_mesh()
        prepare_folder(self.out, resume)
        self.mesh = make_mesh(self.experiment.mesh)
        self.policy = transformer(self.experiment.policy)
        self.key = jax.device_put(jax.random.key(self.experiment.seed), replicated(self.mesh))
        self._sampling_key, self._eval_key = (jax.random.fold_in(self.key, p) for p in (SAMPLING, EVALUATION))
        self._quiet = quiet
        self._written, self._checked = 0.0, False
        self._evaluator = make_evaluator(
            self.experiment, self.policy, self.mesh, self.experiment.evaluation.num_prompts
        )
        self._checkpoints = Checkpoints(self.out / "checkpoints")
        self._resumed = self._checkpoints.latest_metadata() if resume else None
        self._writer = MetricsWriter(
            self.out,
            resume_offset=(self._resumed or {"metrics_offset": 0})["metrics_offset"] if resume else None,
            resume_step=(self._resumed or {"step": 0})["step"] if resume else None,
        )
        self._write_header(resume)

    def _write_header(self, resume: bool) -> None:
        lines = config_lib.flatten(self.config)
        path = self.out / "config.txt"
        if resume and path.exists():
            changed = config_lib.diff(config_lib.read_lines(path), lines)
            if changed:
                print(f"the config differs from that of the run:\n{changed}")
        config_lib.write_lines(path, lines)
        (self.out / "config.json").write_text(config_lib.dump(self.config), encoding="utf-8")
        (self.out / "run.json").write_text(json.dumps(_header(self.config, self.experiment.seed), indent=1) + "\n")

    def _put(self, value: int) -> jax.Array:
        return jax.device_put(np.int32(value), replicated(self.mesh))

    def run(self) -> dict[str, Any]:
        """Runs what is left of the stages; returns the last line of metrics, the final evaluation."""
        stages, params, step = self.experiment.stages, None, 0
        first = self._resumed["stage"] if self._resumed else 0
        total = sum(stage.steps for stage in stages if isinstance(stage, Reinforce))
        with Progress(total, initial=(self._resumed or {"step": 0})["step"], quiet=self._quiet) as self._bar:
            for index in range(first, len(stages)):
                stage = stages[index]
                if isinstance(stage, Supervised):
                    params = self._supervise(index, stage, params)
                else:
                    state = self._reinforce(index, stage, params, step)
                    params, step = state.params, int(jax.device_get(state.step))
            line = self._finish(params, step)
        self._checkpoints.close()
        self._writer.close()
        return line

    def _supervise(self, index: int, stage: Supervised, params: Any) -> Any:
        task = self.experiment.task

        def report(step: int, loss: float) -> None:
            self._bar.note(f"{stage.name} {step}/{stage.steps}: loss {loss:.3f} nats")

        def train(start: Any) -> Any:
            return run_supervised(stage, self.policy, task, start, self.mesh, report)

        if index > 0:
            return train(params)
        params, cached = cached_warm_start(
            self.config, self.policy, self.mesh, lambda: train(init_params(self.policy, stage.seed, self.mesh))
        )
        self._bar.note(f"{stage.name}: {'from the cache' if cached else 'done'}")
        return params

    def _start_stage(self, index: int, stage: Reinforce, params: Any, step: int) -> TrainState:
        """The state at the start of the stage, or where the checkpoint left it."""

        template = state_template(self.experiment, self.policy, self.mesh, index)
        if self._resumed is not None and self._resumed["stage"] == index:
            return self._checkpoints.restore(None, template)[0]
        if params is None:
            params = init_params(self.policy, self.experiment.seed, self.mesh)
        start = jax.jit(functools.partial(_fresh, stage), out_shardings=jax.tree.map(lambda x: x.sharding, template))
        return start(params, self._put(step), self.key)

    def _reinforce(self, index: int, stage: Reinforce, params: Any, step: int) -> TrainState:
        """Runs one stage of reinforcement learning from `step` rollouts on."""
        state = self._start_stage(index, stage, params, step)
        done = self._resumed["stage_step"] if self._resumed and self._resumed["stage"] == index else 0
        start = int(jax.device_get(state.step)) - done
        objective, task = stage.objective, self.experiment.task
        spec = make_spec(
            self.policy, objective, stage.optimizer, reference=stage.reference, num_minibatches=stage.num_minibatches,
            num_epochs=stage.num_epochs, num_microbatches=stage.num_microbatches,
        )  # fmt: skip
        sampler = RolloutSpec(
            stage.num_generations, task.max_new_tokens, task.tokenizer.eos_id, task.tokenizer.pad_id,
            objective.temperature, task.rewards,
        )  # fmt: skip
        rollout = make_rollout(self.policy, sampler, self.mesh)
        train_step = make_train_step(spec, stage.num_prompts, self.mesh)
        source = task.prompts("train", stage.mixture)
        pending: tuple[int, Any, float] | None = None
        compiled = 0
        with jax.transfer_guard("disallow"):
            for n in range(done, stage.steps):
                now = start + n
                if n == done or n % self.experiment.evaluation.every == 0:
                    pending = self._write(stage, pending)
                    evaluated = self._evaluator(state.params, self._eval_key, now)
                    if n % self.experiment.evaluation.every == 0:
                        self._writer.write(now, {"stage": stage.name, **evaluated})
                began = time.perf_counter()
                prompts = source.batch(self.experiment.seed, now, stage.num_prompts)
                rows, _ = rollout(state.params, self._sampling_key, self._put(now), *put_prompts(prompts, self.mesh))
                rows = grade_on_host(task, rows, prompts)
                state, metrics = train_step(state, rows)
                self._write(stage, pending)
                pending = (now, metrics, began)
                if n - done < _WARM:
                    pending = self._write(stage, pending, check_sampler=not self._checked)
                    self._checked = True
                    compiled = num_compilations()
                elif num_compilations() != compiled:
                    raise RuntimeError(f"step {now}: {num_compilations() - compiled} compilations after the warm-up")
                if (n + 1) % self.experiment.checkpoint_every == 0 or n + 1 == stage.steps:
                    pending = self._write(stage, pending)
                    self._save(index, n + 1, state)
                    compiled = num_compilations()
        return state

    def _write(self, stage: Reinforce, pending: Any, check_sampler: bool = False) -> None:
        """Fetches and writes the metrics of a step that was dispatched before; returns None, nothing is pending."""
        if pending is None:
            return
        step, device_metrics, began = pending
        metrics = divide(jax.device_get(device_metrics))
        if check_sampler and metrics["sampler/logp_diff_relative"] > self.experiment.sampler_tolerance:
            raise RuntimeError(
                f"sampler and trainer disagree on log-probabilities by {metrics['sampler/logp_diff_max']:.2e} nats, "
                f"more than sampler_tolerance = {self.experiment.sampler_tolerance:.2e} times max(1, their size)"
            )
        now = time.perf_counter()
        seconds, self._written = now - max(began, self._written), now
        tokens = metrics["response_length/mean"] * stage.num_prompts * stage.num_generations
        self._writer.write(step, {"stage": stage.name, **metrics})
        self._writer.write_timing(step, {"seconds": seconds, "tokens": tokens, "compilations": num_compilations()})
        self._bar.update(step + 1, reward=metrics["critic/score/mean"], entropy=metrics["actor/entropy"])

    def _save(self, index: int, stage_step: int, state: TrainState) -> None:
        step = int(jax.device_get(state.step))
        metadata = {
            "stage": index, "stage_step": stage_step, "step": step, "metrics_offset": self._writer.offset(),
        }  # fmt: skip
        self._checkpoints.save(step, state, metadata)

    def _finish(self, params: Any, step: int) -> dict[str, Any]:
        """The final evaluation, greedy decoding included, and the plot."""
        num_prompts = self.experiment.evaluation.final_num_prompts
        final = make_evaluator(self.experiment, self.policy, self.mesh, num_prompts)
        name = self.experiment.stages[-1].name
        line: Mapping[str, Any] = {"stage": name, "final": True, **final(params, self._eval_key, step, greedy=True)}
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
        state = checkpoints.restore(None, state_template(experiment, policy, mesh, metadata["stage"]))[0]
    evaluator = make_evaluator(experiment, policy, mesh, experiment.evaluation.final_num_prompts)
    found = evaluator(state.params, jax.random.fold_in(key, EVALUATION), metadata["step"], greedy=True)
    line = {"step": metadata["step"], **found}
    (out / "eval.json").write_text(json.dumps(line, indent=1) + "\n", encoding="utf-8")
    return line


def train(config: fdl.Config, out: Path, *, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Runs an experiment config in a folder; returns its final metrics. See `Run`."""
    enable_compilation_cache()
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    return Run(config, out, resume=resume, quiet=quiet).run()
