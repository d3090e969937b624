"""The doctor on a run of the tiny experiment that was struck three times: files, replays, comparisons."""

import functools
import json
import shutil

import fiddle as fdl
import numpy as np
import pytest
import tiny
from poison import poison

from jentropy import config as config_lib
from jentropy import embedded
from jentropy.train import loop
from jentropy.train.doctor import check_metrics, compare, doctor
from jentropy.train.metrics import read_metrics
from jentropy.train.quarantine import SKIPPED, NumericError, load_batch, save_batch, stored_steps
from jentropy.train.replay import ReplayError, replay

pytestmark = pytest.mark.usefixtures("own_folders")

STRUCK = {4: 0.5, 7: 1.0, 8: 1.0}
"""Share of skipped updates by rollout. Stages begin at 0 and 5; checkpoints are kept at 5, 8 and 9."""


def struck() -> fdl.Config:
    """The tiny experiment, with an infinite gradient of one row in rollout 4 and a NaN loss in rollouts 7 and 8."""
    config = tiny.tiny()
    strikes = (
        fdl.Config(poison, step=4, row=5, where="gradient", value="inf"),
        fdl.Config(poison, step=7, num_steps=2, where="loss"),
    )
    for stage, strike in zip(config.stages[1:], strikes, strict=True):
        stage.objective = embedded.objective({"poison": strike})
    return config


@functools.cache
def experiment():
    return config_lib.build(struck())


def example_id(step):
    stage = experiment().stages[1 if step < tiny.BEFORE else 2]
    return experiment().task.prompts("train", stage.mixture).batch(0, step, stage.num_prompts).example_id


@pytest.fixture(scope="module")
def run(own_folders, tmp_path_factory):
    """The folder of the run."""
    out = tmp_path_factory.mktemp("struck") / "run"
    loop.train(struck(), out, quiet=True)
    return out


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def test_a_struck_rollout_costs_its_updates_and_the_run_goes_on(run):
    lines = read_metrics(run / "metrics.jsonl")
    assert {line["step"]: line[SKIPPED] for line in lines if line.get(SKIPPED)} == STRUCK
    assert lines[-1]["final"]


def test_a_healthy_run_has_no_problem(run):
    report = doctor(run)
    assert report.problems == () and report.exit_code == 0
    assert "9 rollouts, finished" in report.notes and "checkpoints: 5, 8, 9" in report.notes
    assert "3 rollouts had updates skipped: 4, 7, 8" in report.notes
    assert "quarantined: step 7, its rollouts are finite" in report.notes
    assert report.text().startswith(f"{run}: no problem\nnote: ")


def test_it_changes_nothing(copy):
    def contents():
        return {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}

    before = contents()
    doctor(copy, replay_newest=True, config=struck())
    assert contents() == before


# From the warm start, the end of the stage before, and a checkpoint of the stage itself.
@pytest.mark.parametrize(("step", "start"), [(4, 0), (7, 5), (8, 8)])
def test_a_replay_is_the_step_of_the_run_bit_by_bit(run, step, start):
    found = replay(run, step, struck())
    assert found == (step, start, None, STRUCK[step], STRUCK[step])
    assert "not finite again" in found.text() and "every metric is the one the run wrote" in found.text()


def test_the_newest_batch_is_replayed_by_default(run):
    report = doctor(run, replay_newest=True, config=struck())
    assert report.replay.step == 8 and report.exit_code == 70
    assert "replay: step 8, replayed from step 8: not finite again (100% of its updates" in report.text()


def test_a_batch_that_is_finite_now_is_said_to_be(copy):
    batch, description = load_batch(copy / "quarantine", 8)
    save_batch(copy / "quarantine", batch, {**description, "step": 6})
    report = doctor(copy, replay_step=6, config=struck())
    assert report.exit_code == 0 and report.replay.skipped == 0.0
    assert "step 6, replayed from step 5: finite now" in report.text()
    assert report.replay.departed == 6, "the rollouts are those of another step"


def test_a_replay_says_where_it_departs_from_the_run(copy):
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if json.loads(line)["step"] == 6 and SKIPPED in line)
    row = json.loads(lines[at])
    lines[at] = json.dumps({**row, "actor/grad_norm": np.nextafter(row["actor/grad_norm"], 9)}, sort_keys=True) + "\n"
    (copy / "metrics.jsonl").write_text("".join(lines))
    found = replay(copy, 7, struck())
    assert found.departed == 6 and found.skipped == 1.0
    assert "but from rollout 6 on the metrics are not those the run wrote" in found.text()


def test_what_cannot_be_replayed_says_why(copy, tmp_path):
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(ReplayError, match=r"has no checkpoint .*'after' can be replayed; checkpoints before it: none"):
        replay(copy, 7, struck())
    with pytest.raises(ReplayError, match=r"has no stage 'before' of reinforcement learning"):
        replay(copy, 4, config_lib.apply_overrides(struck(), ["stages.1.name=other"]))
    shutil.rmtree(copy / "quarantine")
    with pytest.raises(ReplayError, match="has no quarantined batch"):
        replay(copy, None, struck())
    with pytest.raises(FileNotFoundError, match="holds no run"):
        doctor(tmp_path / "nowhere")


def damaged(copy, number, change):
    """The metrics with line `number` (from 1) changed."""
    lines = (copy / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    lines[number - 1] = change(lines[number - 1])
    (copy / "metrics.jsonl").write_bytes(b"".join(lines))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda line: b"\x00" + line[1:], "line 2: "),
        (lambda line: b"[1]\n", "line 2: not an object"),
        (lambda line: b'{"step": -1}\n', "line 2: step is -1"),
        (lambda line: b'{"step": true}\n', "line 2: step is True"),
        (lambda line: b'{"loss": NaN, "step": 0}\n', "line 2: NaN is not JSON"),
        (lambda line: line.replace(b'": ', b'":', 1), "line 2: not spelled as it is written"),
        (lambda line: b"", "line 2: rollout 1 where 0 is due"),
        (lambda line: line + line, "line 3: rollout 0 where 1 is due"),
        (lambda line: line.replace(b'"step": 0', b'"step": 3'), "line 3: step 1 after step 3"),
    ],
)
def test_a_damaged_line_is_named(copy, change, message):
    damaged(copy, 2, change)
    report = doctor(copy)
    assert report.exit_code == 65 and any(f"metrics.jsonl, {message}" in text for text in report.problems)
    assert "problem: metrics.jsonl, line" in report.text()


def test_a_torn_last_line_is_no_damage(copy):
    size = (copy / "metrics.jsonl").stat().st_size
    with (copy / "metrics.jsonl").open("ab") as file:
        file.write(b'{"actor/ent')
    assert check_metrics(copy).problems == ()
    assert "the last line is torn after 11 bytes" in check_metrics(copy).notes[0]
    report = doctor(copy)
    assert report.exit_code == 0 and (copy / "metrics.jsonl").stat().st_size == size + 11


def test_metrics_that_do_not_reach_a_checkpoint_are_a_problem(copy):
    lines = (copy / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_bytes(b"".join(lines[:6]))
    problems = doctor(copy).problems
    assert len(problems) == 3 and all("no line of metrics.jsonl ends at byte" in text for text in problems)


def test_missing_and_changed_files_are_problems(copy):
    for name in ("config.json", "quarantine/step-00000007.npz"):
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
    first, second = doctor(copy).problems
    assert first == "config.json is not the config whose identity is in run.json"
    assert "step-00000007.npz is damaged" in second
    for name in ("config.json", "metrics.jsonl"):
        (copy / name).unlink()
    problems = doctor(copy).problems
    assert f"{copy / 'config.json'} is missing" in problems and f"{copy / 'metrics.jsonl'} is missing" in problems


def test_a_changed_checkpoint_is_a_problem(copy):
    largest = max((copy / "checkpoints" / "8").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    problems = doctor(copy).problems
    assert problems and all(text.startswith("checkpoint 8: ") for text in problems)


def test_equal_runs_are_equal(run, copy):
    report = doctor(run, other=copy)
    assert report.difference == "" and report.exit_code == 0
    assert report.text().endswith("compared: the metrics are equal")


def test_the_first_difference_is_named(run, copy):
    def change(line):
        row = json.loads(line)
        row["actor/entropy"] += 1.0
        del row["cov/mean"]
        return json.dumps(row, sort_keys=True).encode() + b"\n"

    damaged(copy, 3, change)
    row = read_metrics(run / "metrics.jsonl")[2]
    found = compare(run, copy)
    assert found.startswith(f"line 3, step {row['step']}: actor/entropy {row['actor/entropy']!r} / ")
    assert found.endswith(f"cov/mean {row['cov/mean']!r} / 'missing'")
    damaged(copy, 3, lambda line: b"{\n")
    assert compare(run, copy).startswith("line 3: one of the two cannot be read")


def test_a_shorter_run_and_another_config_are_differences(run, copy):
    lines = (copy / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_bytes(b"".join(lines[:4]))
    (copy / "config.txt").write_text((copy / "config.txt").read_text().replace("seed = 0", "seed = 1"))
    report = doctor(run, other=copy)
    assert report.difference == f"equal for 4 lines, where {copy} ends; the other has {len(lines)}"
    assert report.exit_code == 1
    assert any(note.startswith("the configs differ:\n") and "+seed = 1" in note for note in report.notes)
    (copy / "metrics.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"no metrics\.jsonl"):
        compare(run, copy)


def test_four_struck_rollouts_in_a_row_stop_the_run_and_keep_its_checkpoint(tmp_path):
    config = struck()
    config.stages[1].objective = embedded.objective({"poison": fdl.Config(poison, step=0, num_steps=5, where="loss")})
    with pytest.raises(NumericError, match="the last 4 rollouts, up to step 3, had updates skipped"):
        loop.train(config, tmp_path / "run", quiet=True)
    assert stored_steps(tmp_path / "run" / "quarantine") == [0, 1, 2, 3]
    report = doctor(tmp_path / "run")
    assert report.problems == () and any("checkpoints: 3" in note for note in report.notes)
