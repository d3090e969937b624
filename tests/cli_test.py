"""The command line without training: configs found and changed, refusals with exit code 2, help."""

import errno
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from jentropy import cli
from jentropy.data import jsonl
from jentropy.train import checkpoint, lock, quarantine, signals
from jentropy.train.checkpoint import CheckpointError

CONFIGS = Path(__file__).parent.parent / "experiments" / "configs"
SMOKE = str(CONFIGS / "smoke.py")


@pytest.fixture
def trained(monkeypatch):
    """The calls of `train`, which does nothing."""
    calls = []

    def train(config, out, *, resume, strict, allow_change):
        assert not strict and not allow_change
        calls.append((config, out, resume))
        return {"step": 10, "val/reward/mean@8": 0.5}

    monkeypatch.setattr(cli, "train", train)
    return calls


def refused(capsys, *argv):
    """What a command that ends with exit code 2 says; it must be one line and not a traceback."""
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("jentropy: ") and "Traceback" not in captured.err
    return captured.err.strip()


def test_train_builds_the_changed_config(trained, capsys):
    assert cli.main(["train", SMOKE, "--out", "somewhere", "--set", "stages.1.steps=3", "--set", "name=plain"]) == 0
    ((config, out, resume),) = trained
    assert (config.name, config.stages[1].steps, config.stages[2].steps) == ("plain", 3, 4)
    assert out == Path("somewhere") and resume is False
    text = capsys.readouterr().out
    assert json.loads(text[: text.index("Picture")]) == {"step": 10, "val/reward/mean@8": 0.5}
    assert f"Picture: {Path('somewhere') / 'plot.png'}\nRun: somewhere" in text


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (lambda: checkpoint.CorruptCheckpointError("step 2 is damaged"), 65),
        (lambda: jsonl.CorruptDataError("the data have changed"), 65),
        (lambda: quarantine.NumericError("the last 4 rollouts"), 70),
        (lambda: lock.LockedError("run 1 on host"), 73),
        (lambda: checkpoint.CheckpointWriteError("disk full"), 74),
        (lambda: OSError(errno.ENOSPC, "no room", "somewhere"), 74),
        (lambda: signals.PreemptedError("SIGTERM"), 75),
        (lambda: PermissionError("not writable"), 2),
    ],
)
def test_what_ends_a_run_has_an_exit_code(error, code, monkeypatch, capsys):
    def train(*args, **kwargs):
        raise error()

    monkeypatch.setattr(cli, "train", train)
    assert cli.main(["train", SMOKE]) == code
    assert capsys.readouterr().err.startswith("jentropy: ")


def test_a_run_is_named_by_its_config_and_may_be_resumed(trained):
    assert cli.main(["train", SMOKE, "--resume"]) == 0
    assert trained[0][1:] == (Path("runs") / "smoke", True)


def test_values_take_the_type_of_their_field(trained):
    cli.main(["train", SMOKE, "--set", "stages.1.optimizer.learning_rate=1", "--set", "stages.1.mixture.2=2"])
    stage = trained[0][0].stages[1]
    assert stage.optimizer.learning_rate == 1.0 and type(stage.optimizer.learning_rate) is float
    assert stage.mixture == {2: 2.0}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.1.optimizer.learning_rte=1e-3", "has no 'learning_rte'; did you mean 'learning_rate'? Valid: "),
        ("stages.1.objective.mechanisms.clip_kov=1", "did you mean 'clip_cov'?"),
        ("stages.7.steps=1", "has no '7'; did you mean '2'? Valid: 0, 1, 2"),
        ("sede=1", "did you mean 'seed'?"),
        ("stages.1.steps.more=1", "stages.1.steps (6) has no fields"),
        ("stages.1.steps=many", "stages.1.steps: expected int, got 'many' (str)"),
        ("stages.1.steps=2.5", "stages.1.steps: expected int, got 2.5 (float)"),
        ("stages.1.reference=1", "stages.1.reference: expected bool, got 1 (int)"),
        ("task=chain_sum", "task: holds jentropy.data.task.chain_sum_task(...), which no plain value replaces"),
        ("seed", "override 'seed': expected path.to.field=value"),
    ],
)
def test_a_field_that_does_not_exist_or_does_not_fit_is_refused(capsys, trained, override, said):
    assert said in refused(capsys, "train", SMOKE, "--set", override)
    assert trained == []


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("name=../elsewhere", "name must be letters, digits, dots, dashes, underscores, got '../elsewhere'"),
        ("stages.1.steps=0", "stages.1 (Reinforce): steps must be at least 1, got 0"),
        ("stages.1.num_generations=1", "num_generations must be at least 2 here, got 1"),
        ("stages.2.num_prompts=9", "num_prompts must be a multiple of num_minibatches = 2, got 9"),
        ("stages.2.num_microbatches=3", "num_microbatches must be a divisor of the 128 rows of an update, got 3"),
        ("stages.1.objective.temperature=0", "temperature must be positive, got 0"),
        ("stages.1.objective.mechanisms.clip_cov.clip_cov_ratio=2", "clip_cov_ratio must be"),
        ("stages.2.name=before_shift", "stages must be of different names"),
        ("policy.vocab_size=4", "policy.vocab_size must be at least 16, got 4"),
        ("policy.num_kv_heads=3", "num_heads must be a multiple of 3, got 4"),
        ("task.reward=host", "reward must be one of"),
        ("mesh.data=3", "'data': 3, 'fsdp': 1, 'tensor': 1} does not use exactly the"),
        ("mesh.data=0", "mesh.data must be positive, or -1 for the rest, got 0"),
        ("eval_batch=0", "eval_batch must be at least 1, got 0"),
    ],
)
def test_values_that_make_no_experiment_are_refused_before_there_is_a_folder(capsys, tmp_path, override, said):
    out = tmp_path / "run"
    assert said in refused(capsys, "train", SMOKE, "--out", str(out), "--set", override)
    assert not out.exists()


def test_a_file_that_is_no_config_is_refused(capsys, tmp_path, trained):
    assert "missing.py: no such Python file" in refused(capsys, "train", str(tmp_path / "missing.py"))
    for name, source, said in [
        ("nothing", "", "defines no function get_config()"),
        ("number", "def get_config():\n    return 3\n", "get_config() must return an fdl.Config, got int"),
    ]:
        path = tmp_path / f"{name}_config.py"
        path.write_text(source)
        assert said in refused(capsys, "train", str(path))
    assert trained == []


def test_folders_that_hold_something_else_are_refused(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot create the run folder" in refused(capsys, "train", SMOKE, "--out", str(tmp_path / "file" / "run"))
    assert "holds no run to resume" in refused(capsys, "train", SMOKE, "--out", str(tmp_path / "new"), "--resume")
    (tmp_path / "metrics.jsonl").write_text("")
    assert "holds a run already: resume it with --resume" in refused(capsys, "train", SMOKE, "--out", str(tmp_path))
    assert "holds no run: no config.json" in refused(capsys, "eval", str(tmp_path))


def test_checkpoints_that_cannot_be_read_are_refused(capsys, monkeypatch):
    def evaluate_run(run, config):
        raise CheckpointError(f"step 3 in {run} cannot be read")

    monkeypatch.setattr(cli, "evaluate_run", evaluate_run)
    assert refused(capsys, "eval", "broken") == "jentropy: step 3 in broken cannot be read"


def test_eval_prints_its_metrics(capsys, monkeypatch):
    calls = []
    monkeypatch.setattr(cli, "evaluate_run", lambda run, config: calls.append((run, config)) or {"step": 4})
    assert cli.main(["eval", "some/run"]) == 0
    assert json.loads(capsys.readouterr().out) == {"step": 4}
    assert cli.main(["eval", "some/run", "--config", SMOKE]) == 0
    assert calls[0] == (Path("some/run"), None) and calls[1][1].name == "smoke"


def test_quickstart_prints_the_summary_and_says_where_everything_is(capsys, monkeypatch):
    calls = []
    monkeypatch.setattr(cli, "quickstart", lambda out: calls.append(out) or "the table")
    assert cli.main(["quickstart", "--out", "q"]) == 0
    assert cli.main(["quickstart"]) == 0
    text = capsys.readouterr().out
    assert "the table" in text and f"Picture: {Path('q') / 'quickstart.png'}" in text
    assert calls[0] == Path("q") and calls[1].parent == Path("runs") and calls[1].name.startswith("quickstart-")


@pytest.mark.parametrize("argv", [[], ["trian", SMOKE], ["train"], ["train", SMOKE, "--steps", "3"], ["eval"]])
def test_unknown_commands_and_arguments_end_with_code_2_and_the_usage(capsys, argv):
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 2 and "usage: jentropy" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["quickstart", "train", "eval", "run an experiment config", "evaluate the newest checkpoint of a run"]),
        (["quickstart"], ["--out", "default: runs/quickstart-<time>"]),
        (
            ["train"],
            ["CONFIG.py", "get_config()", "--set path.to.field=value", "change a field", "--resume"],
        ),
        (["eval"], ["RUN", "folder of the run", "--config CONFIG.py"]),
    ],
)
def test_help_names_every_argument(capsys, argv, words):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*argv, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    assert [word for word in words if word not in text] == []


def test_a_mistake_in_a_config_file_shows_where_it_is(tmp_path):
    path = tmp_path / "mistaken_config.py"
    path.write_text(
        textwrap.dedent("""
        from jentropy.embedded import shift

        def get_config():
            return shift("mistaken", {"clip_cov": clip_cov})
        """)
    )
    found = subprocess.run([sys.executable, "-m", "jentropy.cli", "train", str(path)], capture_output=True, text=True)
    assert found.returncode != 0 and found.stdout == ""
    assert 'mistaken_config.py", line 5' in found.stderr and "'clip_cov' is not defined" in found.stderr
