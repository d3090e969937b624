"""What a run says in one line: figures of the SHIFT and LAW settings from the lines of `metrics.jsonl`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jentropy.report.plots import law_points
from jentropy.theory.law import Law, LawError, fit_run

WINDOW = 10
"""Rollouts over which the entropy before the shift is averaged."""


def final_line(lines: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The evaluation at the end of a run; raises `ValueError` if the run has not finished."""
    for line in reversed(lines):
        if line.get("final"):
            return line
    raise ValueError("the run has no final evaluation: it has not finished")


def shift_row(lines: Sequence[Mapping[str, Any]], shift_step: int, *, goal: float = 0.9, num_samples: int = 8) -> dict:
    """The figures of one run through a shift of the task.

    Args:
      lines: of `metrics.jsonl`.
      shift_step: rollouts before the shift.
      goal: held-out reward that counts as adapted.
      num_samples: n of the evaluation's mean@n.

    Returns:
      `entropy_before` (nats, mean over tokens and the last `WINDOW` rollouts before the shift), `steps_to_goal`
      (rollouts after the shift until an evaluation reaches `goal`; None if none does), `mean_after` (mean held-out
      reward of the evaluations after the shift), and of the final evaluation `final_reward`, `hard_reward`,
      `pass_at_n`, `greedy_reward`, `entropy_after`.
    """
    before = [
        x["actor/entropy"] for x in lines if "actor/entropy" in x and shift_step - WINDOW <= x["step"] < shift_step
    ]
    after = [(step - shift_step, value) for step, value in _held_out(lines, num_samples) if step > shift_step]
    return {
        "entropy_before": float(np.mean(before)),
        "steps_to_goal": _first(after, goal),
        "mean_after": float(np.mean([value for _, value in after])),
        **_final_figures(lines, num_samples),
    }


def law_row(lines: Sequence[Mapping[str, Any]], *, goal: float = 0.9, num_samples: int = 8) -> dict[str, Any]:
    """The figures of one run of one stage, in which reward is bought with entropy.

    Args:
      lines: of `metrics.jsonl`.
      goal: held-out reward that counts as learned.
      num_samples: n of the evaluation's mean@n.

    Returns:
      `mean_entropy` (nats, mean over tokens and over all rollouts), `steps_to_goal` (rollouts until an evaluation
      reaches `goal`; None if none does), `mean_reward` (mean held-out reward of all evaluations), `ceiling` and
      `r_squared` of the fit of R = -a e^H + b (None if there is no fit), and the final figures of `shift_row`.
    """
    evaluations = _held_out(lines, num_samples)
    row = {
        "mean_entropy": float(np.mean([x["actor/entropy"] for x in lines if "actor/entropy" in x])),
        "steps_to_goal": _first(evaluations, goal),
        "mean_reward": float(np.mean([value for _, value in evaluations])),
        **_final_figures(lines, num_samples),
    }
    try:
        law = law_of(lines)[0]
    except LawError:
        return row | {"ceiling": None, "r_squared": None}
    return row | {"ceiling": law.ceiling, "r_squared": law.r_squared}


def _held_out(lines: Sequence[Mapping[str, Any]], num_samples: int) -> list[tuple[int, float]]:
    """Step and held-out reward of every evaluation."""
    key = f"val/reward/mean@{num_samples}"
    return [(line["step"], line[key]) for line in lines if key in line]


def _first(evaluations: Sequence[tuple[int, float]], goal: float) -> int | None:
    return next((step for step, value in evaluations if value >= goal), None)


def _final_figures(lines: Sequence[Mapping[str, Any]], num_samples: int) -> dict[str, Any]:
    final = final_line(lines)
    return {
        "final_reward": final[f"val/reward/mean@{num_samples}"],
        "hard_reward": final.get(f"val/reward_hard/mean@{num_samples}"),
        "pass_at_n": final[f"val/pass@{num_samples}"],
        "greedy_reward": final["val/reward/greedy"],
        "entropy_after": final["val/entropy"],
    }


def law_of(lines: Sequence[Mapping[str, Any]]) -> tuple[Law, np.ndarray, np.ndarray]:
    """The fit of R = -a e^H + b to all evaluations of a run of one stage, with entropies and rewards `[n]`."""
    stages = law_points(lines)
    if len(stages) != 1:
        raise ValueError(f"the law is a statement about one stage, the run has {list(stages)}")
    ((entropy, reward),) = stages.values()
    return fit_run(entropy, reward), entropy, reward
