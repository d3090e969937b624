"""A stage of preferences in the loop: what it writes, resumed runs, quarantine and replay, what is refused."""

import json

import fiddle as fdl
import pytest
import tiny

from jentropy import config as config_lib
from jentropy.data.task import chain_sum_exits_task
from jentropy.preference import h_dpo
from jentropy.train import loop, preference_step
from jentropy.train.experiment import Experiment
from jentropy.train.metrics import read_metrics
from jentropy.train.optimizer import AdamW
from jentropy.train.preference_stage import Prefer
from jentropy.train.replay import replay
from jentropy.train.resume_rules import Rule, find_changes

STEPS, PAIRS = 5, 8


def learning() -> fdl.Config:
    """The tiny experiment with 5 steps of H-DPO before 2 rollouts."""
    config = tiny.tiny()
    warm_start, before, _ = config.stages
    prefer = fdl.Config(
        Prefer, steps=STEPS, loss=fdl.Config(h_dpo, alpha=0.8, beta=1.0), mixture={2: 1.0, 4: 1.0},
        batch_size=PAIRS, num_microbatches=2, optimizer=before.optimizer,
    )  # fmt: skip
    before.steps = 2
    config.stages = (warm_start, prefer, before)
    return config


def train_until(step, out, change=lambda at, rows: rows):
    """Trains until the batch of pairs number `step` is due; `change` may spoil those before."""
    real, at = preference_step.pair_rollouts, iter(range(step + 1))

    def pair_rollouts(batch):
        now = next(at)
        if now == step:
            raise tiny.InterruptionError
        return change(now, real(batch))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preference_step, "pair_rollouts", pair_rollouts)
        with pytest.raises(tiny.InterruptionError):
            loop.train(learning(), out, quiet=True)


@pytest.fixture(scope="module")
def run(own_folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("preferences") / "run"
    loop.train(learning(), out, quiet=True)
    return out


def test_steps_are_counted_and_evaluated_like_rollouts(run):
    lines = read_metrics(run / "metrics.jsonl")
    steps = [line for line in lines if "actor/loss" in line]
    assert [(line["stage"], line["step"]) for line in steps] == [
        *[("preferences", n) for n in range(STEPS)], *[("before", STEPS + n) for n in range(2)],
    ]  # fmt: skip
    evaluated = [(line["stage"], line["step"]) for line in lines if "val/entropy" in line and not line.get("final")]
    assert evaluated == [("preferences", 0), ("preferences", 2), ("preferences", 4), ("before", 5)]
    assert lines[-1]["final"] and lines[-1]["step"] == STEPS + 2
    for line in steps[:STEPS]:
        assert {"h_dpo/loss", "rewards/margins", "actor/entropy", "actor/grad_norm"} <= line.keys()
        assert line["update/skipped"] == line["h_dpo/length_difference"] == line["preference/groups_without_pair"] == 0
        assert "critic/score/mean" not in line
    assert len({line["h_dpo/loss"] for line in steps[:STEPS]}) == STEPS
    assert all("sampler/logp_diff_max" in line for line in steps[STEPS:])
    timing = [json.loads(line) for line in (run / "timing.jsonl").read_text().splitlines()]
    assert timing[0]["tokens"] == steps[0]["response_length/mean"] * 2 * PAIRS


def test_the_sampler_is_checked_when_sampling_begins(run, tmp_path):
    config = config_lib.apply_overrides(learning(), ["sampler_tolerance=1e-30"])
    with pytest.raises(RuntimeError, match="sampler and trainer disagree"):
        loop.train(config, tmp_path, quiet=True)
    assert max(line["step"] for line in read_metrics(tmp_path / "metrics.jsonl") if "h_dpo/loss" in line) == STEPS - 1


@pytest.mark.parametrize("step", [2, 4])
def test_a_run_resumes_bit_for_bit(run, tmp_path, step):
    train_until(step, tmp_path)
    loop.train(learning(), tmp_path, resume=True, quiet=True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()


def test_a_batch_whose_update_was_skipped_is_kept_and_replayed(run, tmp_path):
    def spoil(at, rows):
        return rows.replace(rewards=0 * rows.rewards) if at == 2 else rows

    train_until(4, tmp_path, spoil)
    again = replay(tmp_path)
    assert again.step == 2 and again.non_finite and again.departed is None


def built(*overrides) -> Experiment:
    return config_lib.build(config_lib.apply_overrides(learning(), overrides))


def test_what_cannot_be_is_refused_when_the_config_is_built():
    with pytest.raises(ValueError, match=r"keep_rollouts: \[4\] are steps of stage 'preferences', which learns from"):
        built("keep_rollouts=(4, 5)")
    assert built("keep_rollouts=(5, 6)").keep_rollouts == (5, 6)
    with pytest.raises(ValueError, match=r"keep_rollouts must be rollouts of the run, in \[0, 7\)"):
        built("keep_rollouts=(7,)")
    with pytest.raises(ValueError, match=r"alpha must be finite and above 0, got 0\.0"):
        built("stages.1.loss.alpha=0.0")
    with pytest.raises(ValueError, match="num_microbatches must be a divisor of batch_size = 8 pairs, got 3"):
        built("stages.1.num_microbatches=3")
    with pytest.raises(ValueError, match=r"given for splits among .* got 7"):
        built().task.preferences({7: 1.0})


def test_a_task_without_pairs_has_no_such_stage():
    config = learning()
    config.task = fdl.Config(chain_sum_exits_task)
    with pytest.raises(ValueError, match="stage 'preferences': task 'chain_sum_exits' has no pairs of responses"):
        config_lib.build(config)
    with pytest.raises(ValueError, match="task 'chain_sum_exits' has no pairs of responses to learn preferences from"):
        config_lib.build(config.task).preferences({2: 1.0})


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("stages.1.loss.alpha=1.0", Rule.REFUSED),
        ("stages.1.optimizer.learning_rate=0.1", Rule.REFUSED),
        ("stages.1.batch_size=16", Rule.WITH_FLAG),
        ("stages.1.mixture.2=0.5", Rule.WITH_FLAG),
        ("stages.1.num_microbatches=1", Rule.WITH_FLAG),
        ("stages.1.steps=7", Rule.WITH_FLAG),
    ],
)
def test_what_may_change_when_a_run_is_resumed(override, rule):
    config = learning()
    config.stages[1].optimizer = fdl.Config(AdamW)
    old, new = (config_lib.flatten(config_lib.apply_overrides(config, change)) for change in ([], [override]))
    (change,) = find_changes(old, new)
    assert change.path == override.partition("=")[0] and change.rule == rule
