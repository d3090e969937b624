"""What the entropy ledger costs: whole training steps with and without it.

    python experiments/benchmarks/ledger.py
    python experiments/benchmarks/ledger.py --write experiments/results/ledger_cost.md

A step is what a run of the LAW setting does for one rollout: it draws 32 prompts, samples 8 responses to each, grades
them, makes 2 x 2 updates of plain GRPO and fetches the metrics. All variants start from the warm start and make the
same steps. Time is that of all threads of the process (`time.process_time`); variants take turns. Use an idle machine.
"""

import dataclasses
import shlex
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from embedded_throughput import Setting
from timing import Call, machine, medians, run

from jentropy import config as config_lib
from jentropy import embedded
from jentropy.policy.transformer import transformer
from jentropy.report.tables import table
from jentropy.train.ledger import Ledger
from jentropy.train.metrics import divide
from jentropy.train.programs import SAMPLING
from jentropy.train.sharding import make_mesh, replicated
from jentropy.train.state import new_stage
from jentropy.train.stepper import Stepper

NEVER = 10**6
"""Steps between first-order predictions, more than are made."""

LEDGERS: Mapping[str, Ledger | None] = {
    "no ledger": None,
    "Lemma 1 and decomposition, every step": Ledger(first_order_every=NEVER),
    "and first order, every step": Ledger(first_order_every=1),
}
SELDOM = 10
"""Steps between first-order predictions in the row that is computed from the two before it."""


def step_call(params: Any, ledger: Ledger | None) -> Call:
    """A step of the LAW setting; each call goes on from the state that the last one left."""
    experiment = config_lib.build(embedded.law())
    stage, mesh = dataclasses.replace(experiment.stages[1], ledger=ledger), make_mesh(experiment.mesh)
    first, key = jax.device_put((np.int32(0), jax.random.key(experiment.seed)), replicated(mesh))
    stepper = Stepper(experiment, stage, transformer(experiment.policy), mesh, jax.random.fold_in(key, SAMPLING))
    copied = jax.tree.map(jnp.copy, params)
    state, step = new_stage(copied, first, key, stage.objective, stage.optimizer, False), 0

    def call() -> Any:
        nonlocal state, step
        state, metrics, _ = stepper(state, step)
        step += 1
        return divide(metrics)

    return call


def rows_of(found: Mapping[str, float]) -> list[dict[str, Any]]:
    """Rows of the table: what each ledger adds to the first variant, as a fraction of it."""
    plain, lemma, all_of_it = found.values()
    mixed = {**found, f"and first order, every {SELDOM} steps": lemma + (all_of_it - lemma) / SELDOM}
    return [{"name": name, "seconds": seconds, "added": seconds / plain - 1.0} for name, seconds in mixed.items()]


def measure(repeats: int, blocks: int) -> str:
    """The table and what stands around it, as Markdown."""
    params = Setting().params
    found = medians({name: step_call(params, ledger) for name, ledger in LEDGERS.items()}, repeats, blocks)
    columns = {"name": "variant", "seconds": "CPU-seconds per step", "added": "added, as a fraction"}
    return f"""# Cost of the entropy ledger

Command: `{shlex.join(["python", *sys.argv])}`

{machine()}
CPU-seconds of all threads for one step of the embedded task, medians of {blocks} blocks of {repeats} steps in which the
variants take turns; the last row is computed from the two before it.

{table(rows_of(found), columns)}
"""


if __name__ == "__main__":
    run(__doc__, measure, repeats=1, blocks=60)
