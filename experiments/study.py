"""Runs methods over warm starts and seeds in the SHIFT setting, and writes a table with intervals.

    python experiments/study.py shift --out runs/shift --write experiments/results/shift.md

Finished runs are kept: called again, it goes on where it stopped. Two cores, about one minute a run.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fiddle as fdl
from run_pool import finished

from jentropy import embedded
from jentropy.mechanisms.clip_range import clip_range
from jentropy.mechanisms.kl_cov import kl_cov
from jentropy.report.comparison import Figure, mean_rows, paired_rows, run_rows
from jentropy.report.summary import shift_row
from jentropy.report.tables import table

METHODS: dict[str, tuple[str, Callable[[], Mapping[str, fdl.Config]]]] = {
    "grpo": ("GRPO", dict),
    "clip_cov": ("Clip-Cov .03, cov in (1, 50)", lambda: {"clip_cov": embedded.scaled_clip_cov()}),
    "entropy_bonus": ("entropy bonus .03", lambda: {"entropy_bonus": embedded.scaled_entropy_bonus()}),
    "kl_cov": ("KL-Cov .1, coefficient 1", lambda: {"kl_cov": fdl.Config(kl_cov, kl_cov_ratio=0.1, ppo_kl_coef=1.0)}),
    "clip_higher": ("clip-higher .5", lambda: {"clip_range": fdl.Config(clip_range, epsilon_high=0.5)}),
}
FIGURES = (
    Figure("entropy_before", "entropy before the shift", good=False),
    Figure("mean_after", "mean reward after it"),
    Figure("final_reward", "final reward"),
    Figure("hard_reward", "reward, n >= 4"),
    Figure("pass_at_n", "pass@8"),
    Figure("greedy_reward", "greedy reward"),
    Figure("entropy_after", "final entropy", good=False),
)


def shift_tables(rows: Mapping[str, list[dict[str, Any]]]) -> str:
    """Means with intervals, paired differences to GRPO, and what each run did."""
    results = {METHODS[method][0]: {(0, i): row for i, row in enumerate(found)} for method, found in rows.items()}
    headings = {figure.key: figure.heading for figure in FIGURES}
    paired = paired_rows(results, METHODS["grpo"][0], FIGURES, "mean_after")
    parts = [table(mean_rows(results, FIGURES), {"method": "method", "runs": "runs"} | headings)]
    if paired:
        parts += ["Paired differences to GRPO on the same warm start and seed:"]
        parts += [table(paired, {"method": "method", "wins": "higher mean reward after"} | headings)]
    parts += ["Each run, in the order of warm starts and then seeds:"]
    columns = {"method": "method", "steps": "steps to reward .9 after the shift", "final_reward": "final reward"}
    parts += [table(run_rows(results, {"final_reward": ".2f"}), columns)]
    return "\n\n".join(parts)


def shift(args: argparse.Namespace) -> str:
    """The SHIFT study as Markdown."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for warm in args.warm_starts:
        for seed in args.seeds:
            for method in args.methods:
                name = f"shift_{method}-w{warm}-s{seed}"
                config = embedded.shift(name, METHODS[method][1](), warm_start_seed=warm, seed=seed)
                row = shift_row(finished(args.out / name, config), embedded.SHIFT_STEP)
                rows.setdefault(method, []).append(row)
                print(name, {k: v if v is None else round(v, 3) for k, v in row.items()}, flush=True)
    return f"""# SHIFT: who can still adapt after the entropy is gone

200 rollouts on two-digit prompts, where a shortcut is enough, then 100 on a mixture where chains are needed
(`jentropy/embedded.py`). Warm starts {args.warm_starts}, seeds {args.seeds} of reinforcement learning on each.

Command: `{args.command}`

Means over runs with 95 % bootstrap intervals over runs. The runs share {len(args.warm_starts)} warm starts, so the
intervals are narrower than those over new warm starts would be. Entropies in nats per token at temperature 1: before
the shift on the training prompts of the last 10 rollouts, at the end on held-out prompts. Rewards after the shift: ten
evaluations of 128 held-out prompts x 8 samples; final figures: 512 prompts x 8 samples. The 20 held-out prompts of two
digits repeat in them.

{shift_tables(rows)}
"""


def main() -> None:
    """Parses the command line, runs the study, prints its tables and writes them if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("shift",))
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--write", type=Path, default=None, help="Markdown file for the tables")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["grpo", "clip_cov", "entropy_bonus"])
    parser.add_argument("--warm-starts", nargs="+", type=int, default=[0, 1], help="default: 0 1")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3], help="default: 0 1 2 3")
    args = parser.parse_args()
    args.command = shlex.join(["python", *sys.argv])
    text = shift(args)
    print(text)
    if args.write:
        args.write.parent.mkdir(parents=True, exist_ok=True)
        args.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
