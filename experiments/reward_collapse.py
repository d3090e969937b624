"""Two rewards, summed before or after they are standardised: GRPO on the weighted sum against GDPO.

    python experiments/reward_collapse.py --out runs/reward_collapse --write experiments/results/reward_collapse.md

Finished runs are kept: called again, it goes on where it stopped. Two cores, about one minute a run.
"""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fiddle as fdl
import numpy as np
from run_pool import finished

from jentropy import config as config_lib
from jentropy import embedded
from jentropy.advantages.gdpo import gdpo
from jentropy.advantages.grpo import grpo
from jentropy.evaluation import bootstrap_interval
from jentropy.report.summary import final_line
from jentropy.report.tables import table

ESTIMATORS = {"grpo": (grpo, "GRPO on the sum"), "gdpo": (gdpo, "GDPO")}
GOAL = 0.9
FIGURES = {
    "resolution": "reward resolution",
    "early_resolution": "of the first 20 rollouts",
    "mean_correct": "mean correct",
    "mean_legal": "mean legal",
    "correct": "final correct",
    "legal": "final legal",
    "pass_at_n": "pass@8",
    "mean_entropy": "mean entropy",
    "entropy": "final entropy",
}
Rows = Mapping[tuple[str, str], list[dict[str, Any]]]
"""What each run did, by weights such as `2:1` and the name of the estimator."""


def config_of(estimator: str, weights: str, warm_start: int, seed: int, overrides: Sequence[str] = ()) -> fdl.Config:
    """LAW with two rewards and one of `ESTIMATORS`.

    Args:
      estimator: a key of `ESTIMATORS`.
      weights: of the answer and of the chain, such as `2:1`.
      warm_start: seed of the supervised stage.
      seed: of reinforcement learning.
      overrides: `path=value` each, applied last.
    """
    factory, _ = ESTIMATORS[estimator]
    numbers = tuple(float(weight) for weight in weights.split(":"))
    name = f"{estimator}-{weights.replace(':', '_')}-w{warm_start}-s{seed}"
    part = fdl.Config(factory, epsilon=1e-4, reward_weights=numbers)
    config = embedded.law(name, warm_start_seed=warm_start, seed=seed, estimator=part)
    config.task.reward = "device+chain"
    return config_lib.apply_overrides(config, overrides)


def run_row(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of one run from the lines of its `metrics.jsonl`.

    A held-out response is worth its answer plus its chain, so the rate of legal chains is the mean reward minus
    `val/pass@1`. Means are over the evaluations after the first one, or over rollouts; `steps_to_goal` is the first
    evaluation at which both rates reach `GOAL`, None if none does.
    """
    resolution = [x["reward_resolution"] for x in lines if "reward_resolution" in x]
    entropy = [x["actor/entropy"] for x in lines if "actor/entropy" in x]
    evaluations = [x for x in lines if "val/pass@1" in x and not x.get("final")]
    correct = np.array([x["val/pass@1"] for x in evaluations])
    legal = np.array([x["val/reward/mean@8"] for x in evaluations]) - correct
    reached = [x["step"] for x, a, b in zip(evaluations, correct, legal) if min(a, b) >= GOAL]
    final = final_line(lines)
    return {
        "resolution": float(np.mean(resolution)),
        "early_resolution": float(np.mean(resolution[:20])),
        "mean_correct": float(correct[1:].mean()),
        "mean_legal": float(legal[1:].mean()),
        "correct": final["val/pass@1"],
        "legal": final["val/reward/mean@8"] - final["val/pass@1"],
        "pass_at_n": final["val/pass@8"],
        "mean_entropy": float(np.mean(entropy)),
        "entropy": final["val/entropy"],
        "steps_to_goal": reached[0] if reached else None,
    }


def _text(values: Sequence[float]) -> str:
    low, high = bootstrap_interval(values, 0, num_resamples=10_000)
    return f"{np.mean(values):.3f} [{low:.3f}, {high:.3f}]"


def tables(rows: Rows) -> str:
    """Means with intervals, paired differences of GDPO to GRPO, and what each run did."""
    means, paired, each = [], [], []
    for (weights, estimator), found in rows.items():
        label = {"weights": weights, "method": ESTIMATORS[estimator][1]}
        means.append(label | {"runs": len(found)} | {f: _text([r[f] for r in found]) for f in FIGURES})
        steps = [str(r["steps_to_goal"]) if r["steps_to_goal"] is not None else "never" for r in found]
        finals = [f"{r['correct']:.2f}/{r['legal']:.2f}" for r in found]
        each.append(label | {"steps": ", ".join(steps), "finals": ", ".join(finals)})
        if estimator == "gdpo" and (weights, "grpo") in rows:
            pairs = list(zip(found, rows[weights, "grpo"], strict=True))
            paired.append({"weights": weights} | {f: _text([a[f] - b[f] for a, b in pairs]) for f in FIGURES})
    head = {"weights": "weights", "method": "method"}
    parts = [table(means, head | {"runs": "runs"} | FIGURES)]
    if paired:
        parts += ["GDPO minus GRPO on the same warm start and seed:", table(paired, {"weights": "weights"} | FIGURES)]
    columns = {"steps": f"rollouts until both are {GOAL}", "finals": "final correct/legal"}
    parts += ["Each run, in the order of warm starts and then seeds:", table(each, head | columns)]
    return "\n\n".join(parts)


def report(args: argparse.Namespace) -> str:
    """The study as Markdown; makes the runs that are not there."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for warm in args.warm_starts:
        for seed in args.seeds:
            for weights in args.weights:
                for estimator in args.estimators:
                    config = config_of(estimator, weights, warm, seed, args.set)
                    row = run_row(finished(args.out / config.name, config))
                    rows.setdefault((weights, estimator), []).append(row)
                    print(config.name, {k: v if v is None else round(v, 3) for k, v in row.items()}, flush=True)
    return f"""# Reward collapse: two rewards, summed before or after they are standardised

Chained addition with two rewards: the correct answer, and a legal chain, that is the step-by-step form with right
running sums before the answer (`jentropy/rewards/chain_sum.py`). Either may be had without the other. The LAW setting
(`jentropy/embedded.py`): both strategies are likely in the warm start, 32 prompts x 8 responses a rollout. GRPO
standardises the weighted sum within groups; GDPO (2601.05242) standardises each reward, sums with the weights and
normalises over the rollout. Weights are answer:chain. At 1:1 GRPO gives a right answer without a chain and a legal
chain with a wrong answer one advantage. Warm starts {args.warm_starts}, seeds {args.seeds} of reinforcement learning
on each.

Command: `{args.command}`

Means over runs with 95 % bootstrap intervals over runs. The runs share {len(args.warm_starts)} warm starts, so the
intervals are narrower than those over new warm starts would be. Reward resolution: distinct advantages per distinct
pair of rewards within groups that have at least two pairs; 1 if nothing collapses; mean over rollouts. Correct and
legal: rates among 8 samples of each held-out prompt, mean over the evaluations (128 prompts, every 5 rollouts), and at
the end (512 prompts). Entropy in nats per token at temperature 1: mean over the rollouts, and on held-out prompts at
the end.

{tables(rows)}
"""


def main() -> None:
    """Parses the command line, runs the study, prints its tables and writes them if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--write", type=Path, default=None, help="Markdown file for the tables")
    parser.add_argument("--estimators", nargs="+", choices=ESTIMATORS, default=list(ESTIMATORS))
    parser.add_argument("--weights", nargs="+", default=["1:1", "2:1"], help="answer:chain")
    parser.add_argument("--warm-starts", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--set", nargs="+", default=[], metavar="PATH=VALUE", help="changes of every run's config")
    args = parser.parse_args()
    args.command = shlex.join(["python", *sys.argv])
    text = report(args)
    print(text)
    if args.write:
        args.write.parent.mkdir(parents=True, exist_ok=True)
        args.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
