"""The loop on the tiny experiment: equal bytes, resume, compilations, folders, warm starts, stages, evaluation."""

import contextlib
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest
import tiny

from jentropy import config as config_lib
from jentropy.policy.transformer import transformer
from jentropy.train import loop, stepper
from jentropy.train.checkpoint import Checkpoints
from jentropy.train.experiment import Supervised
from jentropy.train.lock import LockedError
from jentropy.train.metrics import read_metrics
from jentropy.train.sharding import MeshShape, make_mesh
from jentropy.train.signals import PreemptedError

pytestmark = pytest.mark.usefixtures("own_folders")


def changed(*overrides):
    return config_lib.apply_overrides(tiny.tiny(), overrides)


def train(config, out, **options):
    return loop.train(config, out, quiet=True, **options)


def metrics_bytes(out):
    return (out / "metrics.jsonl").read_bytes()


def final_state(out):
    """Every leaf of the newest checkpoint, as NumPy arrays."""
    experiment = config_lib.build(tiny.tiny())
    mesh = make_mesh(MeshShape())
    template = stepper.state_template(experiment, transformer(experiment.policy), mesh, len(experiment.stages) - 1)
    with Checkpoints(out / "checkpoints") as checkpoints:
        state, _ = checkpoints.restore(None, template)
    return jax.tree.leaves(jax.tree.map(np.asarray, state.replace(key=jax.random.key_data(state.key))))


@pytest.fixture(scope="module")
def finished(own_folders, tmp_path_factory):
    """An uninterrupted run: its folder and what `train` returned."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return out, train(tiny.tiny(), out)


def test_a_run_leaves_what_the_readme_promises(finished):
    out, final = finished
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert config_lib.read_lines(out / "config.txt") == config_lib.flatten(tiny.tiny())
    assert config_lib.identity(config_lib.load(out / "config.json")) == config_lib.identity(tiny.tiny())
    header = json.loads((out / "run.json").read_text())
    assert header["identity"] == config_lib.identity(tiny.tiny()) and header["seed"] == 0
    lines = read_metrics(out / "metrics.jsonl")
    assert lines[-1] == final and final["final"] and final["step"] == tiny.BEFORE + tiny.AFTER
    assert [line["step"] for line in lines if "actor/entropy" in line] == list(range(9))
    assert [line["step"] for line in lines if "val/entropy" in line] == [0, 2, 4, 5, 7, 9]
    assert all("seconds" not in line for line in lines)
    assert any((out / "tensorboard").iterdir())


def test_equal_configs_write_equal_bytes(finished, tmp_path):
    train(tiny.tiny(), tmp_path / "again")
    assert metrics_bytes(tmp_path / "again") == metrics_bytes(finished[0])
    for one, other in zip(final_state(tmp_path / "again"), final_state(finished[0]), strict=True):
        np.testing.assert_array_equal(one, other)


def test_another_seed_writes_other_bytes(finished, tmp_path):
    for seed in (0, 1):
        tiny.train_until(2, changed(f"seed={seed}"), tmp_path / str(seed))
        written = metrics_bytes(tmp_path / str(seed))
        assert written and metrics_bytes(finished[0]).startswith(written) == (seed == 0)


# Checkpoints are at 3, 5 (end of stage), 8 (3 into the second stage) and 9, evaluations at even steps of a stage.
@pytest.mark.parametrize(
    ("step", "resumed_at", "overrides"),
    [
        (1, None, ()),
        (4, 3, ()),  # between evaluations
        (8, 8, ()),  # between evaluations of the second stage
        (3, 2, ("checkpoint_every=2",)),  # at an evaluation
        (7, 5, ()),  # one stage back
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(finished, tmp_path, step, resumed_at, overrides):
    config, out = changed(*overrides), tmp_path / "run"
    tiny.train_until(step, config, out)
    with Checkpoints(out / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() == resumed_at
    assert train(config, out, resume=True) == finished[1]
    assert metrics_bytes(out) == metrics_bytes(finished[0])
    assert [line["step"] for line in read_metrics(out / "timing.jsonl")] == list(range(9))
    for one, other in zip(final_state(out), final_state(finished[0]), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_signal_commits_a_checkpoint_at_the_next_step(finished, tmp_path, monkeypatch):
    config, out, real = tiny.tiny(), tmp_path / "run", stepper.grade_on_host

    def grade_on_host(task, rows, prompts):
        if grade_on_host.calls == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        grade_on_host.calls += 1
        return real(task, rows, prompts)

    grade_on_host.calls = 0
    with monkeypatch.context() as patch:
        patch.setattr(stepper, "grade_on_host", grade_on_host)
        with pytest.raises(PreemptedError, match="SIGTERM: stopped after 4 rollouts with a checkpoint"):
            train(config, out)
    with Checkpoints(out / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() == 4
    assert train(config, out, resume=True) == finished[1]
    assert metrics_bytes(out) == metrics_bytes(finished[0])


@pytest.mark.parametrize(("stage_start", "when"), [(0, "before the first rollout"), (5, "after 5 rollouts")])
def test_a_signal_during_an_evaluation_stops_before_a_rollout(finished, tmp_path, monkeypatch, stage_start, when):
    out, real = tmp_path / "run", loop.Run._evaluate

    def evaluate(run, stage, params, step, *, write):
        if step == stage_start:
            os.kill(os.getpid(), signal.SIGTERM)
        real(run, stage, params, step, write=write)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "_evaluate", evaluate)
        with pytest.raises(PreemptedError, match=f"SIGTERM: stopped {when}"):
            train(tiny.tiny(), out)
    with Checkpoints(out / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() == stage_start
    assert train(tiny.tiny(), out, resume=True) == finished[1]
    assert metrics_bytes(out) == metrics_bytes(finished[0])


def test_a_second_run_in_the_folder_names_the_first(tmp_path):
    with contextlib.closing(loop.Run(tiny.tiny(), tmp_path / "run", quiet=True)):
        with pytest.raises(LockedError, match=f"in use by process {os.getpid()}"):
            train(tiny.tiny(), tmp_path / "run", resume=True)


def test_a_change_that_needs_the_flag_is_refused_without_it(finished, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "run")
    with pytest.raises(config_lib.ConfigError, match="needs --allow-change"):
        train(changed("stages.2.num_epochs=1"), out, resume=True)
    with pytest.raises(config_lib.ConfigError, match="cannot be resumed with these changes"):
        train(changed("seed=1"), out, resume=True, allow_change=True)
    train(changed("stages.2.num_epochs=1"), out, resume=True, allow_change=True)
    assert "num_epochs" in (out / "lineage.jsonl").read_text()


def test_a_finished_run_resumes_to_its_final_evaluation(finished, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "run")
    assert train(tiny.tiny(), out, resume=True) == finished[1]
    assert metrics_bytes(out) == metrics_bytes(finished[0])


def test_resume_says_what_changed(finished, tmp_path, capsys):
    out = shutil.copytree(finished[0], tmp_path / "run")
    train(changed("evaluation.every=3"), out, resume=True)
    assert "-evaluation.every = 2\n+evaluation.every = 3" in capsys.readouterr().err
    assert "evaluation.every = 3" in config_lib.read_lines(out / "config.txt")


def test_rewards_of_text_give_the_metrics_of_rewards_on_the_device(finished, tmp_path):
    tiny.train_until(tiny.BEFORE, changed("task.reward=text"), tmp_path / "text")
    lines = read_metrics(tmp_path / "text" / "metrics.jsonl")
    assert lines[-1]["stage"] == "after" and len(lines) == tiny.BEFORE + 3 + 1
    assert metrics_bytes(finished[0]).startswith(metrics_bytes(tmp_path / "text"))


def test_nothing_compiles_after_the_warm_up(finished):
    counts = {line["step"]: line["compilations"] for line in read_metrics(finished[0] / "timing.jsonl")}
    assert counts[0] > 0
    for stage in (range(1, tiny.BEFORE), range(tiny.BEFORE + 1, tiny.BEFORE + tiny.AFTER)):
        assert len({counts[step] for step in stage}) == 1


def test_a_compilation_after_the_warm_up_is_an_error(tmp_path, monkeypatch):
    real, seen = stepper.grade_on_host, []

    def grade_on_host(task, rows, prompts):
        seen.append(rows)
        if len(seen) == 4:
            jax.jit(lambda x: x * x)(rows.rewards)
        return real(task, rows, prompts)

    monkeypatch.setattr(stepper, "grade_on_host", grade_on_host)
    with pytest.raises(RuntimeError, match=r"step 3: 1 compilations after the warm-up"):
        train(tiny.tiny(), tmp_path / "run")


def test_a_sampler_that_disagrees_with_the_trainer_is_an_error(tmp_path):
    message = r"disagree on log-probabilities by \d\.\d\de-\d\d nats, more than sampler_tolerance = 1.00e-15"
    with pytest.raises(RuntimeError, match=message):
        train(changed("sampler_tolerance=1e-15"), tmp_path / "run")


def test_stages_have_prompts_and_an_optimizer_of_their_own(finished, tmp_path, monkeypatch):
    real, digits = stepper.put_prompts, []

    def put_prompts(prompts, mesh):
        digits.append(set(prompts.fields["num_digits"].tolist()))
        return real(prompts, mesh)

    monkeypatch.setattr(stepper, "put_prompts", put_prompts)
    train(changed("stages.1.steps=1", "stages.2.steps=1"), tmp_path / "run")
    assert digits == [{2}, {3}]
    lines = read_metrics(finished[0] / "metrics.jsonl")
    assert [line["stage"] for line in lines if "actor/entropy" in line] == ["before"] * 5 + ["after"] * 4
    counts = [leaf for leaf in final_state(finished[0]) if leaf.shape == () and leaf.dtype == np.int32]
    assert 4 * tiny.AFTER in counts and 4 * (tiny.BEFORE + tiny.AFTER) not in counts


def test_a_run_may_start_without_a_warm_start_and_learn_from_demonstrations_later(tmp_path):
    config = tiny.tiny()
    warm_start, before, _ = config.stages
    config.stages = (before, warm_start)
    final = train(config, tmp_path / "run")
    assert final["step"] == tiny.BEFORE and final["stage"] == "warm_start"
    assert isinstance(config_lib.build(config).stages[-1], Supervised)


def test_the_evaluation_of_a_run_is_its_final_line(finished):
    out, final = finished
    line = loop.evaluate_run(out)
    assert line == {name: value for name, value in final.items() if name not in ("stage", "final")}
    assert json.loads((out / "eval.json").read_text()) == line


def test_the_evaluation_of_an_interrupted_run_is_that_of_its_checkpoint(tmp_path):
    tiny.train_until(4, tiny.tiny(), tmp_path / "run")
    assert loop.evaluate_run(tmp_path / "run")["step"] == 3


def test_what_cannot_be_evaluated_says_why(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere holds no run: no config.json"):
        loop.evaluate_run(tmp_path / "nowhere")
    tiny.train_until(1, tiny.tiny(), tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="run has no checkpoint"):
        loop.evaluate_run(tmp_path / "run")


def test_a_folder_that_holds_a_run_is_kept(finished):
    before = metrics_bytes(finished[0])
    with pytest.raises(FileExistsError, match=r"holds a run already: resume it with --resume, or choose another --out"):
        train(tiny.tiny(), finished[0])
    assert metrics_bytes(finished[0]) == before


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run to resume"):
        train(tiny.tiny(), tmp_path / "run", resume=True)


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(PermissionError, match=f"cannot create the run folder {out}"):
            train(tiny.tiny(), out)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match=r"the run folder .*run is not writable"):
        train(tiny.tiny(), tmp_path / "run")
