"""The study of two rewards: its configs, the figures of a run, its tables."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from jentropy import config as config_lib
from jentropy.train.sharding import MeshShape, make_mesh
from jentropy.train.warm_start import warm_start_name

PATH = Path(__file__).parent.parent / "experiments" / "reward_collapse.py"


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("reward_collapse", PATH)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PATH.parent)
        spec.loader.exec_module(module)
    return module


def test_configs_differ_in_estimator_and_weights_only(study):
    mesh = make_mesh(MeshShape())
    configs = {
        (e, w): study.config_of(e, w, 1, 2, ["stages.1.steps=7"]) for e in study.ESTIMATORS for w in ("1:1", "2:1")
    }
    assert len({config.name for config in configs.values()}) == 4
    assert len({warm_start_name(config, mesh) for config in configs.values()}) == 1
    for (estimator, weights), config in configs.items():
        built = config_lib.build(config)
        assert [reward.name for reward in built.task.rewards] == ["chain_sum", "legal_chain"]
        stage = built.stages[1]
        assert (stage.steps, built.seed, built.stages[0].seed) == (7, 2, 1)
        method = stage.objective.estimator
        assert method.estimate.__module__ == f"jentropy.advantages.{estimator}"
        state = method.init()
        np.testing.assert_array_equal(state.reward_weights, [1 + (weights == "2:1"), 1])
        assert float(state.epsilon) == pytest.approx(1e-4)


def lines(correct, legal, resolution):
    """The metrics of a run of two evaluations and a final one, and of 30 rollouts."""
    rates = [(0.5, 0.4), (0.9, 0.8), (correct, legal)]
    found = [{"step": 5 * i, "val/pass@1": a, "val/reward/mean@8": a + b} for i, (a, b) in enumerate(rates)]
    final = {"final": True, "step": 30, "val/pass@1": correct, "val/reward/mean@8": correct + legal}
    rollouts = [
        {"step": i, "actor/entropy": 0.2, "reward_resolution": resolution if i < 20 else 1.0} for i in range(30)
    ]
    del rollouts[25]["reward_resolution"]  # no group had two pairs of rewards
    return [*found, *rollouts, final | {"val/pass@8": 1.0, "val/entropy": 0.1}]


def test_figures_of_a_run(study):
    row = study.run_row(lines(0.95, 0.9, 0.7))
    expected = {
        "resolution": (20 * 0.7 + 9) / 29, "early_resolution": 0.7, "mean_correct": 0.925, "mean_legal": 0.85,
        "correct": 0.95, "legal": 0.9, "pass_at_n": 1.0, "mean_entropy": 0.2, "entropy": 0.1, "steps_to_goal": 10,
    }  # fmt: skip
    assert row == pytest.approx(expected)
    assert study.run_row(lines(0.95, 0.85, 0.7))["steps_to_goal"] is None
    with pytest.raises(ValueError, match="has not finished"):
        study.run_row(lines(0.95, 0.9, 0.7)[:-1])


def test_tables(study):
    grpo = [study.run_row(lines(c, 0.9, 0.7)) for c in (0.91, 0.93)]
    gdpo = [study.run_row(lines(c + 0.02, 0.8, 0.9)) for c in (0.91, 0.93)]
    text = study.tables({("1:1", "grpo"): grpo, ("1:1", "gdpo"): gdpo, ("2:1", "gdpo"): gdpo})
    means, _, paired, _, each = text.split("\n\n")
    assert "0.920 [0.910, 0.930]" in means
    assert "0.020 [0.020, 0.020]" in paired and "-0.100 [-0.100, -0.100]" in paired and "2:1" not in paired
    assert "never, never" in each and "0.91/0.90, 0.93/0.90" in each
