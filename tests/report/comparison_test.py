"""Comparison of methods on hand-made rows: intervals, pairs, verdicts, and sentences that follow from them."""

import numpy as np
import pytest

from jentropy.report.comparison import (
    Figure,
    chance,
    gains,
    half_there,
    in_order,
    interval,
    interval_text,
    judge,
    mean_rows,
    paired_rows,
    run_rows,
    sentence,
)

REWARD, ENTROPY = Figure("reward", "final reward"), Figure("entropy", "final entropy", good=False)
BASE = (0.5, 0.6, 0.7, 0.6, 0.5, 0.6, 0.7, 0.6)


def runs(rewards, steps=None, entropy=0.1):
    """Runs on two warm starts, half of the seeds on each; a reward of None is a run that failed."""
    steps = steps or [10] * len(rewards)
    pairs = [(i // (len(rewards) // 2 or 1), i) for i in range(len(rewards))]
    rows = [
        None if reward is None else {"reward": reward, "steps_to_goal": step, "entropy": entropy}
        for reward, step in zip(rewards, steps, strict=True)
    ]
    return dict(zip(pairs, rows, strict=True))


def shifted(*by):
    return [round(x + d, 6) for x, d in zip(BASE, by, strict=True)]


RESULTS = {
    "mixed": runs(shifted(0.1, -0.1, 0.1, -0.1, 0.1, -0.1, 0.1, -0.1), entropy=0.3),
    "bad": runs(shifted(*[-0.2, -0.3] * 4)),
    "GRPO": runs(BASE, [10, 20, 30, None, 10, 20, 30, None]),
    "good": runs(shifted(*[0.1, 0.2] * 4), [10, 10, 40, 50, 10, 20, None, None]),
    "broken": runs([*shifted(*[0.3] * 8)[:7], None]),
}


def test_an_interval_is_the_one_over_resampled_means():
    values = [0.1, 0.4, 0.2, 0.9]
    rng = np.random.default_rng(0)
    means = sorted(sum(values[i] for i in row) / 4 for row in rng.integers(0, 4, (10_000, 4)))
    mean, low, high = interval(values)
    assert mean == pytest.approx(0.4)
    assert means[249] <= low <= means[250] and means[9749] <= high <= means[9750]
    assert interval([0.25] * 3) == (0.25, 0.25, 0.25)
    assert interval_text([0.25, 0.25]) == "0.250 [0.250, 0.250]" and interval_text([]) is None


def test_gains_are_differences_of_pairs_and_not_of_places():
    base = runs(BASE)
    turned = dict(reversed(RESULTS["good"].items()))
    assert sorted(gains(turned, base, "reward")) == pytest.approx([0.1] * 4 + [0.2] * 4)
    assert gains(RESULTS["broken"], base, "reward") == pytest.approx([0.3] * 7)
    assert gains(base, {}, "reward") == []


def test_half_of_all_runs_those_that_failed_included():
    assert half_there(runs([0.5] * 4, [30, None, 10, 20])) == "20"
    assert half_there(runs([0.5] * 5, [10, 20, None, None, 30])) == "30"
    assert half_there(runs([0.5] * 4, [10, None, None, None])) == "never"
    assert half_there(runs([0.5, None, None, 0.5], [10, 10, 10, 20])) == "20"
    assert half_there(runs([0.5, None, None, None], [10, 10, 10, 20])) == "never"


def test_methods_are_told_apart_by_their_intervals():
    found = judge(RESULTS, "GRPO", "reward")
    assert found.above == [("good", pytest.approx(0.15))]
    assert found.below == [("bad", pytest.approx(-0.25))]
    assert found.unclear == [("mixed", pytest.approx(0.0))]
    assert found.unjudged == [("broken", 1)]


def test_an_interval_that_touches_zero_contains_it():
    results = {"GRPO": runs(BASE), "same": runs(BASE), "once": runs(shifted(0.2, *[0.0] * 7))}
    assert [method for method, _ in judge(results, "GRPO", "reward").unclear] == ["once", "same"]


def test_a_baseline_that_failed_takes_the_verdict_from_all():
    results = {"GRPO": runs([*BASE[:7], None]), "good": RESULTS["good"]}
    found = judge(results, "GRPO", "reward")
    assert found.unjudged == [("good", 1)] and not (found.above or found.below or found.unclear)


def test_sentences_have_the_three_lists_and_the_runs_that_failed():
    assert sentence(RESULTS, "GRPO", REWARD) == (
        "**Final reward.** Better than GRPO: good (+0.150). Worse than GRPO: bad (-0.250). Not distinguishable from "
        "GRPO: mixed (+0.000). Not judged, because runs failed or are missing: broken (1 of 8)."
    )
    whole = {method: RESULTS[method] for method in ("GRPO", "mixed", "bad")}
    assert sentence(whole, "GRPO", ENTROPY) == (
        "**Final entropy.** Higher than GRPO: mixed (+0.200). Lower than GRPO: none. Not distinguishable from GRPO: "
        "bad (+0.000)."
    )


def test_lists_are_in_the_order_of_the_differences():
    results = {"GRPO": runs(BASE)} | {
        f"{by:+.1f}": runs(shifted(*[by] * 8)) for by in (0.1, -0.1, 0.3, -0.3, 0.2, -0.2)
    }
    text = sentence(results, "GRPO", REWARD)
    assert "Better than GRPO: +0.3 (+0.300), +0.2 (+0.200), +0.1 (+0.100)." in text
    assert "Worse than GRPO: -0.3 (-0.300), -0.2 (-0.200), -0.1 (-0.100)." in text


def test_the_baseline_comes_first_and_methods_by_their_gain():
    assert list(in_order(RESULTS, "GRPO", "reward")) == ["GRPO", "broken", "good", "mixed", "bad"]
    results = RESULTS | {"none": runs([None] * 8)}
    assert list(in_order(results, "GRPO", "reward"))[-1] == "none"


def test_tables_count_what_failed():
    rows = {row["method"]: row for row in mean_rows(RESULTS, [REWARD])}
    assert rows["GRPO"]["runs"] == 8 and rows["GRPO"]["half"] == "20"
    assert rows["GRPO"]["reward"].startswith("0.600 [")
    assert rows["broken"]["runs"] == "7 of 8"
    nothing = mean_rows({"none": runs([None, None])}, [REWARD])[0]
    assert nothing == {"method": "none", "runs": "0 of 2", "half": None, "reward": None}
    paired = {row["method"]: row for row in paired_rows(RESULTS, "GRPO", [REWARD, ENTROPY], "reward")}
    assert list(paired) == ["mixed", "bad", "good", "broken"]
    assert paired["good"]["wins"] == "8 of 8" and paired["broken"]["wins"] == "7 of 8"
    assert paired["mixed"]["wins"] == "4 of 8" and paired["bad"]["wins"] == "0 of 8"
    assert paired["bad"]["reward"] == interval_text(gains(RESULTS["bad"], RESULTS["GRPO"], "reward"))
    assert paired_rows(RESULTS, "nobody", [REWARD], "reward") == []


def test_who_was_sooner_never_is_later_than_any_step():
    paired = {row["method"]: row["sooner"] for row in paired_rows(RESULTS, "GRPO", [REWARD], "reward")}
    assert paired["good"] == "2 : 2"  # 10 before 20, 50 before never; 40 after 30, never after 30
    assert paired["broken"] == "5 : 0"  # the run that failed and the baseline's never are equal


def test_every_run_is_listed():
    row = run_rows({"x": runs([0.51, None, 0.7], [10, 10, None])}, {"reward": ".1f"})[0]
    assert row == {"method": "x", "steps": "10, no result, never", "reward": "0.5, no result, 0.7"}
    nothing = {"x": {(0, 0): {"steps_to_goal": 5, "ceiling": None}}}
    assert run_rows(nothing, {"ceiling": ".2f"})[0]["ceiling"] == "none"


def test_chance_grows_as_runs_become_fewer():
    eight = chance(RESULTS, "GRPO", 7)
    assert "here 1.4 of 28." in eight and "tendencies" not in eight
    four = chance({method: dict(list(found.items())[:4]) for method, found in RESULTS.items()}, "GRPO", 7)
    assert "With 4 runs of each method" in four and "once in 8." in four
    assert chance({"GRPO": runs([0.5]), "x": runs([0.6])}, "GRPO", 1).endswith("tells nothing.")
    assert chance({"GRPO": runs(BASE)}, "GRPO", 7) == ""
