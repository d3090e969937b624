"""What mechanisms cost: top-entropy against a sort, and a chain of thirteen against a plain training step.

    python experiments/benchmarks/mechanisms.py
    python experiments/benchmarks/mechanisms.py --write experiments/results/mechanisms.md

Selection: `top_entropy` on 4 M tokens, of which a tenth are padding, against `jnp.sort` of the same array. Step: all
updates on one rollout of the LAW setting, 32 prompts x 8 responses, 2 x 2 minibatches; a chain of all of `MECHANISMS`
against `clip_range` alone, where the forward pass scores the same outputs in both, so that it is not counted. Time is
that of all threads of the process (`time.process_time`); variants take turns. Use an idle machine.
"""

import shlex
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from embedded_throughput import Setting
from timing import Call, machine, medians, run

from jentropy.base import Mechanism, Objective, Rollouts, Signals, initial_plan
from jentropy.compose import chain
from jentropy.mechanisms.adaptive_entropy import adaptive_entropy
from jentropy.mechanisms.ce_gppo import ce_gppo
from jentropy.mechanisms.clip_cov import clip_cov
from jentropy.mechanisms.clip_range import clip_range
from jentropy.mechanisms.entropy_advantage import entropy_advantage
from jentropy.mechanisms.entropy_bonus import entropy_bonus
from jentropy.mechanisms.importance_correction import importance_correction
from jentropy.mechanisms.kl_cov import kl_cov
from jentropy.mechanisms.kl_reference import kl_reference
from jentropy.mechanisms.semantic_entropy import semantic_entropy
from jentropy.mechanisms.siren import siren
from jentropy.mechanisms.steer import steer
from jentropy.mechanisms.top_entropy import top_entropy
from jentropy.policy.transformer import transformer
from jentropy.report.tables import table
from jentropy.train.optimizer import AdamW
from jentropy.train.sharding import MeshShape, make_mesh, replicated
from jentropy.train.state import new_stage
from jentropy.train.step import StepSpec, make_spec, make_train_step

MECHANISMS: Mapping[str, Callable[[], Mechanism]] = {
    "clip_range": clip_range,
    "importance_correction": importance_correction,
    "semantic_entropy": semantic_entropy,
    "entropy_advantage": entropy_advantage,
    "ce_gppo": ce_gppo,
    "clip_cov": lambda: clip_cov(clip_cov_ratio=0.03, clip_cov_ub=50.0),
    "kl_cov": lambda: kl_cov(kl_cov_ratio=0.1, keep_clip=True),
    "steer": steer,
    "top_entropy": lambda: top_entropy(top_entropy_quantile=0.5),
    "entropy_bonus": lambda: entropy_bonus(entropy_coef=0.01),
    "adaptive_entropy": lambda: adaptive_entropy(entropy_coef_init=0.001),
    "siren": siren,
    "kl_reference": kl_reference,
}
"""In an order in which each has what it reads; no experiment would combine them all."""

SHAPE = (1024, 4096)


def tokens(shape: tuple[int, int]) -> tuple[Signals, jax.Array]:
    """Signals of `[B, T]` tokens, one in ten padding, seven in ten with a small entropy; an advantage."""
    rng = np.random.default_rng(0)
    scale = np.where(rng.random(shape) < 0.7, 0.02, 1.0)
    entropy = jnp.asarray(scale * rng.exponential(size=shape), jnp.float32)
    rows, ones = jnp.arange(shape[0], dtype=jnp.int32), jnp.ones(shape)
    batch = Rollouts(
        tokens=jnp.zeros(shape, jnp.int32), loss_mask=jnp.asarray(rng.random(shape) < 0.9), logp_sampler=ones,
        logp_old=ones, rewards=ones[:, :1], row_id=rows, group=rows, parent=rows, fork=rows,
    )  # fmt: skip
    step = jnp.int32(0)
    return Signals(batch=batch, scores={"log_prob": -entropy, "entropy": entropy}, step=step, update_index=step), ones


def selection_calls(shape: tuple[int, int]) -> dict[str, Call]:
    """The sort, and `top_entropy` under each of its rules and scopes, jitted."""
    signals, advantage = tokens(shape)
    plan, key = initial_plan(signals.batch, advantage), jax.random.key(0)

    def call(mechanism: Mechanism) -> Call:
        update = jax.jit(lambda *args: mechanism.update(*args)[0].replace(advantage=0, ratio_low=0, ratio_high=0))
        return lambda: update(plan, mechanism.init(), signals, key)

    sort = jax.jit(lambda x: jnp.sort(x.ravel()))
    options = {
        "top_entropy": {},
        "top_entropy, rule quantile": {"rule": "quantile"},
        "top_entropy, scope sequence": {"scope": "sequence"},
    }
    return {
        "jnp.sort": lambda: sort(signals.scores["entropy"]),
        **{name: call(top_entropy(**option)) for name, option in options.items()},
    }


class Steps:
    """Training steps of chains on one rollout of the LAW setting, whose rows hold what any mechanism needs."""

    def __init__(self) -> None:
        setting = Setting()
        self._params, self._stage = setting.params, setting.stage
        self._policy, self._mesh = transformer(setting.config), make_mesh(MeshShape())
        rows = setting.rows
        answers = jnp.max(jnp.where(rows.loss_mask & (rows.tokens < 10), rows.tokens, -1), axis=1)
        self._rows = rows.replace(
            token_data={**rows.token_data, "ref_log_prob": rows.logp_sampler},
            row_data={**rows.row_data, "answer_id": answers},
        )

    def _spec(self, objective: Objective) -> StepSpec:
        stage = self._stage
        return make_spec(
            self._policy, objective, AdamW(), num_minibatches=stage.num_minibatches, num_epochs=stage.num_epochs
        )

    def call(self, mechanisms: Mapping[str, Mechanism], outputs_of: Mechanism) -> Call:
        """A step of the chain that scores what `outputs_of` needs; it goes on from the state the last call left."""
        objective: Objective = self._stage.objective._replace(mechanisms=chain(**mechanisms))
        spec = self._spec(objective)._replace(outputs=self._spec(objective._replace(mechanisms=outputs_of)).outputs)
        step = make_train_step(spec, self._stage.num_prompts, self._mesh)
        first, key = jax.device_put((np.int32(0), jax.random.key(0)), replicated(self._mesh))
        state = [new_stage(jax.tree.map(jnp.copy, self._params), first, key, objective, AdamW(), False)]

        def call() -> Any:
            state[0], metrics = step(state[0], self._rows)
            return metrics

        return call


def step_calls(steps: Steps) -> dict[str, Call]:
    """`clip_range` and the chain; without SIREN, whose nuclei are a costly output, and with it."""
    made = {name: make() for name, make in MECHANISMS.items()}
    plain = {"clip_range": made["clip_range"]}
    cheap = {name: mechanism for name, mechanism in made.items() if name != "siren"}
    calls = {}
    for mechanisms in (cheap, made):
        outputs, number = chain(**mechanisms), len(mechanisms)
        calls[f"clip_range alone, outputs of {number}"] = steps.call(plain, outputs)
        calls[f"{number} mechanisms"] = steps.call(mechanisms, outputs)
    return calls


def rows_of(found: Mapping[str, float], group: int) -> list[dict[str, Any]]:
    """Rows of a table; the ratio is to the first of each `group` consecutive entries."""
    names = list(found)
    return [
        {"name": name, "seconds": found[name], "ratio": found[name] / found[names[i - i % group]]}
        for i, name in enumerate(names)
    ]


def measure(repeats: int, blocks: int) -> str:
    """The tables and what stands around them, as Markdown."""
    selection = medians(selection_calls(SHAPE), 1, blocks)
    step = medians(step_calls(Steps()), repeats, blocks)
    columns = {"name": "variant", "seconds": "CPU-seconds", "ratio": "ratio"}
    return f"""# Cost of the mechanisms

Command: `{shlex.join(["python", *sys.argv])}`

{machine()}
CPU-seconds of all threads, medians of {blocks} blocks in which the variants take turns.

`top_entropy`, everything it does to a plan, on {SHAPE[0] * SHAPE[1]} tokens of which nine in ten count; ratio to the
sort of the same array:

{table(rows_of(selection, len(selection)), columns)}

All updates on one rollout of the embedded task, {repeats} calls a block: a chain of {len(MECHANISMS)} mechanisms, and
the same without SIREN, whose nuclei are a costly output. Ratio to `clip_range` alone with the same outputs of the
forward pass:

{table(rows_of(step, 2), columns)}
"""


if __name__ == "__main__":
    run(__doc__, measure, repeats=10, blocks=9)
