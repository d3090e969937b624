"""The law R = -a exp(H) + b over sizes of the policy, estimators and seeds, beside the paper's figures.

    python experiments/law_study.py --out runs/law --write experiments/results/law.md
    python experiments/law_study.py --sizes 0.1M --estimators grpo rloo --seeds 0 1

Runs of the LAW setting without entropy control, evaluated more often than there, with the entropy ledger. Seed s is
that of the warm start as well, so runs of different seeds share nothing. Finished runs are kept: called again, it goes
on where it stopped. On two cores, about a quarter of a minute a run of 0.1 M parameters, and ten times as much of 1 M.
"""

import argparse
import functools
import itertools
import sys
import textwrap
from collections.abc import Mapping
from typing import TypeAlias

import fiddle as fdl
import jax
from ablation import CONFIGS, make_task, pairs_of, parser, run_and_write
from law_tables import ESTIMATORS, PAPER_FRACTION, Run, agreement, sections
from run_pool import Task, is_finished, read_failure

from jentropy import config as config_lib
from jentropy.policy.transformer import TransformerConfig, transformer
from jentropy.report.fit import fit_curves, read_curves
from jentropy.report.summary import final_line
from jentropy.train.ledger import Ledger
from jentropy.train.metrics import read_metrics

SIZES: dict[str, dict[str, int]] = {
    "0.1M": {},
    "0.3M": {"width": 112, "num_heads": 7, "num_kv_heads": 7, "mlp_width": 296},
    "1M": {"width": 208, "num_heads": 13, "num_kv_heads": 13, "mlp_width": 552},
}
"""What is changed in the policy of LAW: the width of its two layers, in heads of 16."""
Key: TypeAlias = tuple[str, str, tuple[int, int]]
"""Size, estimator, and pair of warm start and seed."""


@functools.cache
def num_parameters(policy: TransformerConfig) -> int:
    """Of a policy."""
    shapes = jax.eval_shape(transformer(policy).init, jax.random.key(0))
    return sum(x.size for x in jax.tree.leaves(shapes))


def make_tasks(args: argparse.Namespace) -> dict[Key, Task]:
    """The runs of the study."""
    seeds = args.seeds or [0, 1, 2, 3, 4]
    pairs = pairs_of(args.warm_starts, seeds) if args.warm_starts else [(seed, seed) for seed in seeds]
    tasks = {}
    for size, estimator, pair in itertools.product(args.sizes, args.estimators, pairs):
        config = config_lib.load_config(CONFIGS / f"law_{estimator}.py")
        for field, value in SIZES[size].items():
            setattr(config.policy, field, value)
        name = f"law_{size}_{estimator}"
        task = make_task(config, name, name, pair, args)
        if args.smoke:
            config.policy.mlp_width = 16 * (1 + list(SIZES).index(size))
        else:
            config.evaluation.every = args.every
        config.stages[-1].ledger = fdl.Config(Ledger, args.ledger, 10 * args.ledger) if args.ledger else None
        tasks[size, estimator, pair] = task
    return tasks


def found_runs(tasks: Mapping[Key, Task]) -> list[Run]:
    """Those of the runs that have finished."""
    runs = []
    for (size, estimator, pair), task in tasks.items():
        if is_finished(task.out):
            curves = read_curves([task.out])
            runs.append(
                Run(
                    size, estimator, pair, num_parameters(config_lib.build(task.config.policy)),
                    fit_curves(curves)["curves"][0], (curves[0].entropy, curves[0].reward),
                    final_line(read_metrics(task.out / "metrics.jsonl")), agreement(task.out / "ledger.jsonl"),
                )
            )  # fmt: skip
    return runs


ABOUT = """
Runs without entropy control from a warm start in which both strategies of chained addition are likely
(`jentropy/embedded.py`), and the fit of R = -a exp(H) + b to their evaluations: {every} on {prompts} held-out prompts x
{samples} samples, the last one on {final}. H is the entropy per token at the temperature of sampling, in nats, on those
prompts. {steps} rollouts each; sizes differ in the width of the two layers, estimators in nothing else; the learning
rate is the same for all. a, b ± standard error; the ceiling at zero entropy with its 90 % bootstrap interval.
Evaluations of one run are not independent, so the errors of single runs are too small by an unknown factor; what holds
over runs has intervals over warm starts and seeds, of Student's t. Runs of one size and seed share a warm start.
"""
PAPER = """
The paper (arXiv 2505.22617, section 2) has policies of 0.5 to 32 billion parameters, 2400 rollouts, and H on the
training prompts. Of its figures, those of entropy spent and reward gained are means of 11 models, and the forecast is
from the first 36 steps; it stands here beside the one from the first {fraction:.0%} of the evaluations.
"""


def document(tasks: Mapping[Key, Task], command: str) -> str:
    """The Markdown file."""
    config = next(iter(tasks.values())).config
    evaluation = config.evaluation
    about = ABOUT.format(
        every=f"every {evaluation.every} rollouts", prompts=evaluation.num_prompts, samples=evaluation.num_samples,
        final=evaluation.final_num_prompts, steps=config.stages[1].steps,
    )  # fmt: skip
    parts = ["# LAW: reward is bought with entropy, over sizes, estimators and seeds", f"Command: `{command}`"]
    parts += [textwrap.fill(" ".join(text.split()), 120) for text in (about, PAPER.format(fraction=PAPER_FRACTION))]
    parts += sections(found_runs(tasks))
    missing = [task for task in tasks.values() if not is_finished(task.out)]
    if missing:
        lines = [f"- `{task.config.name}`: {read_failure(task.out) or 'not made, or not finished'}" for task in missing]
        parts += ["Runs without figures, which are in no table:", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """Parses the command line, makes the runs and writes the document."""
    options = parser(__doc__ or "", "runs/law", "that of the seed")
    options.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    options.add_argument("--estimators", nargs="+", choices=ESTIMATORS, default=list(ESTIMATORS))
    options.add_argument("--every", type=int, default=2, help="rollouts between evaluations (default: 2)")
    options.add_argument("--ledger", type=int, default=1, help="rollouts between entries of the ledger, 0 for none")
    args = options.parse_args()
    tasks = make_tasks(args)
    return run_and_write(args, list(tasks.values()), lambda command: document(tasks, command))


if __name__ == "__main__":
    sys.exit(main())
