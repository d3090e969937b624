"""How well Lemma 1 and the other predictions agree with the measured change of the entropy, on runs of the LAW setting.

    python experiments/ledger_study.py --out runs/ledger --write experiments/results/ledger.md

The runs are those of `experiments/configs/law_ledger.py` on five warm starts. Runs that have finished are kept: called
again, it goes on where it stopped. Every run gets a picture of its ledger, `ledger.png`. Two cores, about a minute a
run.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ablation import CONFIGS, make_task, parser, run_and_write
from run_pool import Task, is_finished, read_failure

from jentropy import config as config_lib
from jentropy.report.ledger_plot import MEASURED, Agreement, agreement, ledger_plot
from jentropy.report.tables import table
from jentropy.train.metrics import read_metrics

GOAL = 0.98
"""Of the correlation of Lemma 1 with the measured change, in every run."""

PREDICTIONS: Mapping[str, tuple[str, float]] = {
    "lemma1": ("Lemma 1", 1.0),
    "first_order": ("first order", 1.0),
    "covariance": ("-covariance of tokens", -1.0),
    "response_covariance": ("-covariance of responses", -1.0),
}
"""Quantity in the ledger -> what it is called, and its sign as a prediction."""


def tasks_of(args: argparse.Namespace) -> list[Task]:
    """The runs."""
    path = CONFIGS / "law_ledger.py"
    pairs = itertools.product(args.warm_starts or range(5), args.seeds or [0])
    return [make_task(config_lib.load_config(path), "law_ledger", "law_ledger", pair, args) for pair in pairs]


def agreements(lines: Sequence[Mapping[str, Any]]) -> dict[str, Agreement]:
    """Of every prediction with what was measured, over the lines of one `ledger.jsonl`."""
    return {name: agreement(lines, f"ledger/{name}", sign=sign) for name, (_, sign) in PREDICTIONS.items()}


def row_of(name: str, lines: Sequence[Mapping[str, Any]], found: Mapping[str, Agreement]) -> dict[str, Any]:
    """A row of the table; a prediction without a correlation has none."""
    row: dict[str, Any] = {"run": name, "steps": len(lines), "change": sum(line[MEASURED] for line in lines)}
    for key, result in found.items():
        if math.isfinite(result.correlation):
            row[key] = f"{result.correlation:.4f}, {result.slope:.3g} ({result.num_steps})"
    return row


def verdict(found: Mapping[str, Mapping[str, Agreement]]) -> str:
    """Whether Lemma 1 reaches the goal, in a sentence."""
    values = [results["lemma1"].correlation for results in found.values()]
    if not values:
        return "No run has finished."
    reached = sum(value >= GOAL for value in values)
    least = "one has no correlation" if any(map(math.isnan, values)) else f"the least is {min(values):.4f}"
    return (
        f"The correlation of Lemma 1 with the measured change is at least {GOAL} in {reached} of {len(values)} runs; "
        f"{least}."
    )


def document(tasks: Sequence[Task], command: str) -> str:
    """The study as Markdown, from what is in the folders of the runs."""
    ledgers: dict[str, list[dict[str, Any]]] = {}
    missing = []
    for task in tasks:
        lines = read_metrics(task.out / "ledger.jsonl")
        if is_finished(task.out) and lines:
            ledgers[task.config.name] = lines
            ledger_plot(lines, task.out / "ledger.png", task.config.name)
        else:
            failure = read_failure(task.out)
            missing.append(f"- `{task.config.name}`: {failure or 'not made, or not finished'}")
    found = {name: agreements(lines) for name, lines in ledgers.items()}
    rows = [row_of(name, lines, found[name]) for name, lines in ledgers.items()]
    columns = {"run": "run", "steps": "steps", "change": "sum of measured changes, nats"}
    columns |= {key: heading for key, (heading, _) in PREDICTIONS.items()}
    absent = "\n".join(["\nRuns without figures:", "", *missing, ""]) if missing else ""
    return f"""# The ledger: predicted and measured change of the entropy

Plain GRPO in the LAW setting, one run for each warm start and seed. For every rollout the change of the policy entropy
by all of its updates, on the response tokens of that rollout, measured and predicted: by Lemma 1 of 2505.22617 from the
change of the logits, to first order in the change of the parameters (every tenth step), and by the covariance of
log-probability and advantage, of tokens and of whole responses (with length-normalised log-probabilities, averaged over
prompts), which knows nothing of the update but its direction.

Command: `{command}`

{verdict(found)}

Per prediction: Pearson's correlation with the measured change over the steps of the run, slope of the least squares of
measured on predicted, and in brackets the number of steps. A slope of 1 predicts the size as well; that of minus a
covariance is in the place of a learning rate. Steps of one run are not independent.

{table(rows, columns)}
{absent}"""


def main() -> int:
    """Parses the command line and runs the study."""
    args = parser(__doc__ or "", "runs/ledger", "0 1 2 3 4").parse_args()
    tasks = tasks_of(args)
    return run_and_write(args, tasks, lambda command: document(tasks, command))


if __name__ == "__main__":
    sys.exit(main())
