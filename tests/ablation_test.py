"""The ablation: methods found by name, runs kept and resumed, failures shown, processes that die, sweeps, stack."""

import importlib
import json
import os
import shlex
import sys
from pathlib import Path

import pytest
import tiny

from jentropy import config as config_lib
from jentropy.policy.transformer import transformer
from jentropy.train.experiment import Reinforce
from jentropy.train.quarantine import NumericError
from jentropy.train.signals import PreemptedError
from jentropy.train.step import make_spec

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
sys.path.insert(0, str(EXPERIMENTS))
ablation, pool_work, run_pool, sensitivity = map(
    importlib.import_module, ("ablation", "pool_work", "run_pool", "sensitivity")
)


@pytest.fixture(scope="module")
def own_folders(tmp_path_factory):
    """Datasets and caches of these tests."""
    with tiny.own_folders(tmp_path_factory.getbasetemp()) as base:
        yield base


def call(script, arguments, monkeypatch):
    """The exit code of a script."""
    monkeypatch.setattr(sys, "argv", [f"experiments/{script.__name__}.py", *shlex.split(arguments)])
    return script.main()


def metrics_of(config, reward):
    """Metrics of a finished run of SHIFT whose rewards after the shift are all `reward`."""
    shift = config.stages[1].steps
    lines = [{"step": step, "stage": "x", "actor/entropy": 0.2} for step in range(shift)]
    values = {"val/reward/mean@8": reward, "val/reward_hard/mean@8": reward, "val/pass@8": reward, "val/entropy": 0.1}
    lines += [{"step": shift + 1, "stage": "x", **values}]
    return [*lines, {"step": shift + 4, "stage": "x", "final": True, "val/reward/greedy": reward, **values}]


@pytest.fixture
def trained(monkeypatch):
    """Names of the runs that `train` is asked for, with whether to resume them; an exception by name ends one."""
    calls, errors = [], {}

    def train(config, out, *, resume, allow_change, quiet):
        assert quiet and not allow_change
        calls.append((config.name, resume))
        out.mkdir(parents=True, exist_ok=True)
        config_lib.write_lines(out / "config.txt", config_lib.flatten(config))
        lines = metrics_of(config, 0.95 if "clip_cov" in config.name else 0.5 + 0.01 * config.seed)
        error = errors.get(config.name)
        text = "".join(json.dumps(line) + "\n" for line in lines[: 2 if error else None])
        (out / "metrics.jsonl").write_text(text, encoding="utf-8")
        if error:
            raise error

    monkeypatch.setattr(run_pool, "train", train)
    train.calls, train.errors = calls, errors
    return train


SMALL = "--smoke --jobs 1 --methods clip_cov --warm-starts 0 1 --seeds 0 1"


def test_a_second_call_runs_nothing_and_says_the_same(own_folders, tmp_path, monkeypatch):
    arguments = f"--smoke --jobs 1 --methods grpo --warm-starts 0 --seeds 0 1 --out {tmp_path}/runs"
    assert call(ablation, f"{arguments} --write {tmp_path}/ablation.md", monkeypatch) == 0
    text = (tmp_path / "ablation.md").read_text()
    for words in ("| GRPO   |    2 |", "| pass@8 ", "`shift_grpo.py`", "4 rollouts on two-digit prompts"):
        assert words in text
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == ["shift_grpo-w0-s0", "shift_grpo-w0-s1"]
    lines = [(tmp_path / "runs" / name / "metrics.jsonl").read_bytes() for name in names]
    assert lines[0] != lines[1]
    monkeypatch.setattr(run_pool, "train", None)
    assert call(ablation, f"{arguments} --write {tmp_path}/ablation.md", monkeypatch) == 0
    assert (tmp_path / "ablation.md").read_text() == text


def test_a_run_of_the_ablation_is_the_config_with_two_seeds(tmp_path):
    config = config_lib.load_config(EXPERIMENTS / "configs" / "shift_kl_cov.py")
    plain = config_lib.apply_overrides(config, ["seed=5", "stages.0.seed=1", "name=shift_kl_cov-w1-s5"])
    options = ablation.parser("", str(tmp_path)).parse_args([])
    task = ablation.make_task(config, "shift_kl_cov", "program", (1, 5), options)
    assert config_lib.flatten(task.config) == config_lib.flatten(plain)
    assert task.out == tmp_path / "shift_kl_cov-w1-s5"


def test_the_table_the_sentences_and_the_order(trained, tmp_path, monkeypatch, capsys):
    assert call(ablation, f"{SMALL} --out {tmp_path}", monkeypatch) == 0
    text = capsys.readouterr().out
    assert [name for name, _ in trained.calls[:4]] == [f"shift_grpo-w{w}-s{s}" for w in (0, 1) for s in (0, 1)]
    assert "- **Final reward.** Better than GRPO: Clip-Cov (+0.445). Worse than GRPO: none." in text
    assert "- **Final entropy.** Higher than GRPO: none. Lower than GRPO: none. Not distinguishable from GRPO: " in text
    assert "chance does once in 8." in text.replace("\n", " ")
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| Clip")
    ]
    assert cells[0][:3] == ["Clip-Cov", "4", "1"] and cells[1][:3] == ["Clip-Cov", "4 of 4", "4 : 0"]
    assert cells[2] == ["Clip-Cov", "1, 1, 1, 1", "0.95, 0.95, 0.95, 0.95"]
    assert "| GRPO     | never, never, never, never" in text


def test_a_failed_run_is_shown_and_not_made_again(trained, tmp_path, monkeypatch, capsys):
    trained.errors["shift_clip_cov-w0-s1"] = NumericError("the last 4 rollouts had updates skipped\nand more")
    assert call(ablation, f"{SMALL} --out {tmp_path}", monkeypatch) == 0
    text = capsys.readouterr().out
    assert "- `shift_clip_cov-w0-s1`: NumericError: the last 4 rollouts had updates skipped\n" in text
    assert "Not judged, because runs failed or are missing: Clip-Cov (1 of 4)." in text
    assert "3 of 4" in text and "0.95, no result, 0.95, 0.95" in text and "Better than GRPO: Clip-Cov" not in text
    trained.calls.clear()
    assert call(ablation, f"{SMALL} --out {tmp_path}", monkeypatch) == 0
    assert trained.calls == [] and capsys.readouterr().out == text


def test_other_failures_are_tried_again(trained, tmp_path, monkeypatch, capsys):
    trained.errors["shift_grpo-w1-s0"] = ValueError("step 7: reward is not 0 or 1: 2")
    assert call(ablation, f"{SMALL} --out {tmp_path}", monkeypatch) == 1
    assert "- `shift_grpo-w1-s0`: ValueError: step 7: reward is not 0 or 1: 2\n" in capsys.readouterr().out
    trained.calls.clear()
    trained.errors.clear()
    assert call(ablation, f"{SMALL} --out {tmp_path}", monkeypatch) == 0
    assert trained.calls == [("shift_grpo-w1-s0", True)]
    assert "ValueError" not in capsys.readouterr().out and not (tmp_path / "shift_grpo-w1-s0/failed.json").exists()


def test_an_interrupted_ablation_goes_on_where_it_stopped(trained, tmp_path, monkeypatch, capsys):
    trained.errors["shift_clip_cov-w0-s0"] = PreemptedError("SIGTERM: stopped after 100 rollouts")
    assert call(ablation, f"{SMALL} --out {tmp_path} --write {tmp_path}/table.md", monkeypatch) == 75
    assert len(trained.calls) == 5 and not (tmp_path / "table.md").exists()
    assert call(ablation, f"{SMALL} --out {tmp_path} --no-run", monkeypatch) == 0
    assert "- `shift_clip_cov-w0-s0`: not made, or not finished" in capsys.readouterr().out
    trained.calls.clear()
    trained.errors.clear()
    assert call(ablation, f"{SMALL} --out {tmp_path}", monkeypatch) == 0
    assert trained.calls == [(f"shift_clip_cov-w{w}-s{s}", (w, s) == (0, 0)) for w in (0, 1) for s in (0, 1)]


def test_runs_of_another_config_are_refused(trained, tmp_path, monkeypatch, capsys):
    assert call(ablation, f"{SMALL} --out {tmp_path}", monkeypatch) == 0
    path = tmp_path / "shift_clip_cov-w0-s0" / "config.txt"
    lines = config_lib.read_lines(path)
    config_lib.write_lines(path, [line.replace("clip_cov_ratio = 0.03", "clip_cov_ratio = 0.3") for line in lines])
    trained.calls.clear()
    assert call(ablation, f"{SMALL} --out {tmp_path}", monkeypatch) == 2
    message = capsys.readouterr().err
    assert "shift_clip_cov-w0-s0:  stages.1.objective.mechanisms.clip_cov.clip_cov_ratio: 0.3 -> 0.03" in message
    assert call(ablation, f"{SMALL} --out {tmp_path} --allow-change", monkeypatch) == 0
    assert trained.calls == []


def test_an_unknown_method_is_named(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        call(ablation, "--setting law --methods grpo nothing", monkeypatch)
    assert stop.value.code == 2
    assert "no config law_nothing.py in experiments/configs; methods there: grpo, " in capsys.readouterr().err


@pytest.mark.parametrize("setting", ablation.SETTINGS)
def test_every_method_has_a_tier_and_a_title(setting):
    methods = [set(ablation.methods_of_tier(setting, tier)) for tier in ablation.TIERS]
    assert methods[0] & methods[1] == {"grpo"}
    assert methods[0] | methods[1] == set(ablation.methods_of(setting))
    titles = [ablation.title(setting, method) for method in sorted(methods[0] | methods[1])]
    assert len(set(titles)) == len(titles) and all(titles)
    assert ablation.title(setting, "grpo") == "GRPO"


def test_titles_come_from_the_first_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "CONFIGS", tmp_path)
    first = {"grpo": "SHIFT: plain.", "one": "SHIFT with an entropy bonus: it is paid.", "two_words": "Something else."}
    for method, line in first.items():
        (tmp_path / f"shift_{method}.py").write_text(f'"""{line}\n\nMore.\n"""\n')
    titles = [ablation.title("shift", method) for method in ablation.methods_of("shift")]
    assert titles == ["GRPO", "entropy bonus", "two words"]


def test_a_config_of_another_task_is_not_compared(tmp_path):
    options = ablation.parser("", str(tmp_path)).parse_args(["--out", str(tmp_path)])
    options.methods = ["gdpo", "rloo"]
    found = ablation.study("shift", 2, options)
    assert list(found.tasks) == ["GRPO", "RLOO"]
    assert found.notes.endswith("as their task, warm start or evaluation is another one: `shift_gdpo.py`.")
    assert len(found.tasks["RLOO"]) == 2


def tasks_of(*names):
    config = tiny.tiny()
    return [run_pool.Task(config_lib.apply_overrides(config, [f"name={name}"]), Path(name), name[0]) for name in names]


def test_a_process_stays_with_its_program():
    pending = tasks_of("a1", "b1", "b2", "c1", "c2", "c3")

    def chosen(held, last, number=6):
        return run_pool.choose(pending[:number], held, last).config.name

    assert chosen((), "b") == chosen("b", "b") == "b1", "its own program"
    assert chosen((), None) == "c1", "the program of most tasks"
    assert chosen("c", None) == "b1", "but none that another is at"
    assert chosen("abc", None) == "c1" and chosen("a", "b", 1) == "a1", "unless there is no other"


def test_processes_share_the_work_and_one_that_dies_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    tasks = [task._replace(out=tmp_path / task.config.name) for task in tasks_of("a1", "a-dies", "a2", "b-fails", "b1")]
    found = {}
    run_pool.run_all(tasks, 2, pool_work.work, lambda task, failure: found.update({task.config.name: failure}))
    assert {name: failure and failure.error for name, failure in found.items()} == {
        "a1": None, "a2": None, "b1": None, "a-dies": "ProcessDied", "b-fails": "ValueError",
    }  # fmt: skip
    assert run_pool.read_failure(tmp_path / "a-dies") == run_pool.Failure("ProcessDied", "exit status 9")
    said = [(tmp_path / name / "done.txt").read_text().split() for name in ("a1", "a2", "b1")]
    assert str(os.getpid()) not in [pid for pid, *_ in said]
    assert said[0][1:] == ["--xla_cpu_enable_fast_math=false", run_pool.FLAGS]
    assert os.environ["XLA_FLAGS"] == "--xla_cpu_enable_fast_math=false"


def programs(config):
    """What is compiled into the steps of a config."""
    built = config_lib.build(config)
    stages = [stage for stage in built.stages if isinstance(stage, Reinforce)]
    return {make_spec(transformer(built.policy), stage.objective, stage.optimizer) for stage in stages}


@pytest.mark.parametrize("name", sensitivity.SWEEPS)
def test_a_sweep_changes_only_its_numbers_and_compiles_once(name, tmp_path):
    sweep, options = sensitivity.SWEEPS[name], ablation.parser("", "").parse_args(["--out", str(tmp_path)])
    study = sensitivity.sweep_study(name, options)
    runs = [tasks[0, 0] for title, tasks in study.tasks.items() if title != "GRPO"]
    assert len({task.out for task in runs}) == len(runs) and len({task.program for task in runs}) == 1
    assert len(set.union(*(programs(task.config) for task in runs))) == 1
    grid = {tuple(f"{sweep.part}.{number}" for number in sweep.grid)}
    for task in runs[1:]:
        changed = set(config_lib.flatten(task.config)) ^ set(config_lib.flatten(runs[0].config))
        paths = {line.partition(" = ")[0].partition("objective.")[2] for line in changed if "objective" in line}
        assert paths and paths <= set(*grid)
        assert all("objective" in line or line.startswith("name = ") for line in changed)


def test_the_stack_grows_by_one_method_at_a_time():
    chains = []
    for number in range(4):
        config = sensitivity.stacked(number)
        before, after = (list(config_lib.build(stage).objective.mechanisms.init()) for stage in config.stages[1:])
        assert before == after
        chains.append(before)
    assert chains == [["clip_range"], ["clip_range"], ["clip_range", "top_entropy"], [*chains[2], "entropy_advantage"]]
    lines = [set(config_lib.flatten(sensitivity.stacked(number))) for number in range(2)]
    assert any(line.endswith("clip_range.epsilon_high = 0.5") for line in lines[1] - lines[0])


def test_the_stack_is_compared_with_the_row_above(trained, tmp_path, monkeypatch, capsys):
    arguments = f"--smoke --jobs 1 --sweeps stack clip_higher --warm-starts 0 --seeds 0 1 --out {tmp_path}"
    assert call(sensitivity, arguments, monkeypatch) == 0
    text = capsys.readouterr().out
    above = text[text.index("Paired differences of each row to the one above it:") :].split("\n\n")[1]
    assert [line.split("|")[1].strip() for line in above.splitlines()[2:]] == [
        "clip-higher", "clip-higher + top-ρ", "clip-higher + top-ρ + entropy advantage",
    ]  # fmt: skip
    assert "## Clip-higher: the upper bound of the ratio" in text and "| epsilon_high 0.28 |" in text
    grpo = [name for name, _ in trained.calls if name.startswith("shift_grpo")]
    assert len(grpo) == 2, "plain GRPO is run once for all sweeps"
