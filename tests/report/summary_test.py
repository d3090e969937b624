"""The figures of a LAW run, from lines that follow the law or none; those of SHIFT runs are in quickstart_test."""

import math

import pytest

from jentropy.report.summary import law_row


def lines(rewards, entropies):
    """A run with an evaluation every 5 of as many steps as there are entropies, and one at the end."""
    found = []
    for step, entropy in enumerate(entropies):
        if step % 5 == 0:
            found.append(
                {"step": step, "stage": "law", "val/reward/mean@8": rewards[step // 5], "val/entropy": entropy}
            )
        found.append({"step": step, "stage": "law", "actor/entropy": entropy})
    last = {"val/reward/mean@8": rewards[-1], "val/entropy": 0.05, "val/pass@8": 0.99, "val/reward/greedy": 0.97}
    return [*found, {"step": len(entropies), "stage": "law", "final": True, **last}]


def test_figures_of_a_run_that_follows_the_law():
    entropies = [1.0 - 0.1 * step for step in range(10)]
    rewards = [1.5 - 0.5 * math.exp(h) for h in (1.0, 0.5, 0.05)]
    row = law_row(lines(rewards, entropies))
    assert row["ceiling"] == pytest.approx(1.0) and row["r_squared"] == pytest.approx(1.0)
    assert row["mean_entropy"] == pytest.approx(0.55) and row["mean_reward"] == pytest.approx(sum(rewards) / 3)
    assert row["steps_to_goal"] == 10 and row["hard_reward"] is None
    assert (row["pass_at_n"], row["greedy_reward"], row["entropy_after"]) == (0.99, 0.97, 0.05)


def test_a_run_without_a_fit_has_its_other_figures():
    row = law_row(lines([0.4, 0.5, 0.6], [0.05] * 10))
    assert row["ceiling"] is None and row["r_squared"] is None
    assert row["steps_to_goal"] is None and row["final_reward"] == 0.6
