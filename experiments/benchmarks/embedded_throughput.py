"""Tokens per CPU-second of sampling and of updates in the embedded task, against plain matrix products.

    python experiments/benchmarks/embedded_throughput.py
    python experiments/benchmarks/embedded_throughput.py --write experiments/results/embedded_throughput.md

One rollout is 32 prompts x 8 responses of the LAW setting, after its warm start; its updates are 2 x 2 minibatches of
plain GRPO. The floor is the time that the matrix products of the policy alone would take for the tokens there are,
without padding, at the rate of a float32 product of 1024 x 1024 matrices in the same process. Use an idle machine.
"""

import shlex
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from timing import machine, medians, run

from jentropy import config as config_lib
from jentropy import embedded
from jentropy.base import Rollouts
from jentropy.policy.transformer import TransformerConfig, transformer
from jentropy.report.tables import table
from jentropy.rollout.iid import RolloutSpec
from jentropy.train.evaluate import put_prompts
from jentropy.train.programs import make_rollout
from jentropy.train.sharding import make_mesh, replicated
from jentropy.train.state import new_stage
from jentropy.train.step import make_spec, make_train_step
from jentropy.train.warm_start import cached_warm_start, init_params, run_supervised

_SIZE = 1024


class Lengths(NamedTuple):
    """Tokens of one rollout: `[P]` of each prompt, `[P, G]` of each response."""

    prompt: np.ndarray
    response: np.ndarray


def body_flops(config: TransformerConfig, start: np.ndarray, stop: np.ndarray) -> float:
    """Operations of all layers on tokens `start .. stop - 1` of rows (equal shapes); tokens attend to their past."""
    queries, keys = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    weights = config.width * (2 * queries + 2 * keys + 3 * config.mlp_width)
    attended = (stop * (stop + 1) - start * (start + 1)) / 2
    return config.num_layers * float(np.sum(2 * weights * (stop - start) + 4 * queries * attended))


def rollout_flops(config: TransformerConfig, lengths: Lengths) -> float:
    """Every prompt is read once, every response token but the last is read, and every one is drawn from the head."""
    prompt, response = lengths.prompt[:, None], lengths.response
    head = 2 * config.vocab_size * config.width * float(response.sum())
    read = np.broadcast_to(prompt, response.shape)
    return body_flops(config, 0 * prompt, prompt) + body_flops(config, read, read + response - 1) + head


def update_flops(config: TransformerConfig, lengths: Lengths, num_epochs: int) -> float:
    """Forward and backward, three times the forward, over all rows in every epoch."""
    stop = lengths.prompt[:, None] + lengths.response - 1
    head = 2 * config.vocab_size * config.width * float(lengths.response.sum())
    return 3 * num_epochs * (body_flops(config, 0 * stop, stop) + head)


class Setting:
    """The LAW experiment's compiled programs, one rollout and the state after the warm start."""

    def __init__(self) -> None:
        config = embedded.law()
        experiment = config_lib.build(config)
        self.config, self.stage, task = experiment.policy, experiment.stages[1], experiment.task
        policy, mesh = transformer(experiment.policy), make_mesh(experiment.mesh)
        warm_start, objective = experiment.stages[0], self.stage.objective

        def supervise() -> Any:
            params = init_params(policy, warm_start.seed, mesh)
            return run_supervised(warm_start, policy, task, params, mesh, lambda step, loss: None)

        self.params, _ = cached_warm_start(config, policy, mesh, supervise)
        spec = RolloutSpec(
            self.stage.num_generations, task.max_new_tokens, task.tokenizer.eos_id, task.tokenizer.pad_id,
            objective.temperature, task.rewards,
        )  # fmt: skip
        self._prompts = task.prompts("train", self.stage.mixture).batch(0, 0, self.stage.num_prompts)
        self._rollout, self._placed = make_rollout(policy, spec, mesh), put_prompts(self._prompts, mesh)
        self._key, self._step = jax.device_put((jax.random.key(0), np.int32(0)), replicated(mesh))
        step = make_spec(
            policy, objective, self.stage.optimizer,
            num_minibatches=self.stage.num_minibatches, num_epochs=self.stage.num_epochs,
        )  # fmt: skip
        self._update = make_train_step(step, self.stage.num_prompts, mesh)
        params = jax.tree.map(jnp.copy, self.params)
        self._state = new_stage(params, self._step, self._key, objective, self.stage.optimizer, False)
        self.rows = self.rollout()

    def rollout(self) -> Rollouts:
        """Samples and grades one rollout."""
        return jax.block_until_ready(self._rollout(self.params, self._key, self._step, *self._placed)[0])

    def update(self) -> None:
        """All updates on the rollout, from the state that the last call left."""
        self._state, metrics = self._update(self._state, self.rows)
        jax.block_until_ready(metrics)

    def lengths(self) -> Lengths:
        """Tokens of the rollout."""
        response = np.asarray(self.rows.loss_mask).sum(axis=1).reshape(self.stage.num_prompts, -1)
        return Lengths(self._prompts.length, response)


def measure(repeats: int, blocks: int) -> str:
    """The table and what stands around it, as Markdown."""
    setting, x = Setting(), jax.random.normal(jax.random.key(0), (_SIZE, _SIZE))
    product = jax.jit(lambda a, b: a @ b)
    calls = {"rollout": setting.rollout, "update": setting.update, "product": lambda: product(x, x)}
    found, lengths = medians(calls, repeats, blocks), setting.lengths()
    rate, epochs, tokens = 2.0 * _SIZE**3 / found["product"], setting.stage.num_epochs, int(lengths.response.sum())
    parts = {
        "rollout": (found["rollout"], rollout_flops(setting.config, lengths)),
        "update": (found["update"], update_flops(setting.config, lengths, epochs)),
    }
    parts["both"] = (sum(p[0] for p in parts.values()), sum(p[1] for p in parts.values()))
    rows = [
        {
            "part": name, "seconds": seconds, "tokens": round(tokens / seconds),
            "floor": round(tokens * rate / flops), "ratio": flops / rate / seconds,
        }
        for name, (seconds, flops) in parts.items()
    ]  # fmt: skip
    columns = {
        "part": "part", "seconds": "CPU-seconds", "tokens": "tokens per CPU-second",
        "floor": "at the matmul floor", "ratio": "fraction of the floor",
    }  # fmt: skip
    return f"""# Throughput of the embedded task

Command: `{shlex.join(["python", *sys.argv])}`

{machine()}
One rollout: {lengths.response.size} responses to {lengths.prompt.size} prompts, {tokens} response tokens,
{tokens / lengths.response.size:.2f} per response; its updates pass over them {epochs} times. CPU-seconds of all threads
for one rollout, median of {blocks} blocks of {repeats} in which they take turns.
A plain float32 product of {_SIZE} x {_SIZE} matrices: {rate / 1e9:.0f} GFLOP per CPU-second. The floor is that of the
policy's matrix products for the tokens there are, padding not counted.

{table(rows, columns)}
"""


if __name__ == "__main__":
    run(__doc__, measure, repeats=20, blocks=5)
