"""Some rollouts of dynamic sampling on all devices there are; writes what they came to.

Run by `train/dapo_test.py` in a process of its own with eight devices: `python dapo_worker.py OUT.json`.
"""

import json
import sys
from typing import Any

import jax
import numpy as np

from jentropy.advantages.grpo import grpo
from jentropy.base import Objective
from jentropy.compose import chain
from jentropy.data.task import chain_sum_task
from jentropy.mechanisms.clip_range import clip_range
from jentropy.normalisers import token_mean
from jentropy.policy.transformer import TransformerConfig, transformer
from jentropy.rewards.shaping import overlong_reward
from jentropy.rollout.dynamic import DynamicSampling
from jentropy.surrogates import ratio
from jentropy.train.compilations import num_compilations
from jentropy.train.experiment import Evaluation, Experiment, Reinforce
from jentropy.train.optimizer import AdamW
from jentropy.train.sharding import MeshShape, make_mesh, replicated
from jentropy.train.state import new_stage, state_shardings
from jentropy.train.stepper import Stepper


def measure(num_steps: int) -> dict[str, Any]:
    """Kept prompts and loss of the first rollout, the rounds of each, compilations after the second."""
    objective = Objective(grpo(), chain(clip_range=clip_range()), ratio, token_mean)
    stage = Reinforce(
        steps=num_steps, objective=objective, mixture={2: 1.0}, num_prompts=8, num_generations=4, num_epochs=1,
        optimizer=AdamW(learning_rate=1e-3), mask_truncated=True,
        dynamic_sampling=DynamicSampling(max_num_gen_batches=4, on_exhausted="pad"),
        shaping=(overlong_reward(max_length=7, overlong_buffer_length=4),),
    )  # fmt: skip
    experiment = Experiment(
        name="worker", task=chain_sum_task(), stages=(stage,), evaluation=Evaluation(mixture={2: 1.0}), eval_batch=8,
        policy=TransformerConfig(
            vocab_size=16, width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_size=8, mlp_width=16
        ),
    )  # fmt: skip
    policy, mesh = transformer(experiment.policy), make_mesh(MeshShape())
    key = jax.device_put(jax.random.key(0), replicated(mesh))
    state = new_stage(policy.init(jax.random.key(1)), np.int32(0), key, objective, stage.optimizer, False)
    state = jax.device_put(state, state_shardings(policy, mesh, stage.optimizer, state))
    stepper = Stepper(experiment, stage, policy, mesh, jax.random.fold_in(key, 0))
    found, rounds, compiled = {}, [], 0
    with jax.transfer_guard("disallow"):
        for step in range(num_steps):
            state, metrics, batch = stepper(state, step)
            metrics = jax.device_get(metrics)
            rounds.append(float(metrics["dynamic/rounds"][0]))
            found = found or {"example_id": batch.example_id.tolist(), "loss": float(metrics["actor/loss"][0])}
            compiled = num_compilations() if step < 2 else compiled
    return {**found, "rounds": rounds, "compilations": num_compilations() - compiled, "devices": jax.device_count()}


if __name__ == "__main__":
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump(measure(num_steps=4), file)
