"""The smallest experiment that has every kind of stage, for the tests of what surrounds training."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import fiddle as fdl
import jax
import pytest

from jentropy import config as config_lib
from jentropy import embedded
from jentropy.data import chain_sum, chain_sum_pairs, storage
from jentropy.data.task import chain_sum_task
from jentropy.mechanisms.adaptive_entropy import adaptive_entropy
from jentropy.policy.transformer import TransformerConfig
from jentropy.train import loop, stepper
from jentropy.train.experiment import Evaluation, Experiment, Reinforce, Supervised
from jentropy.train.ledger import Ledger
from jentropy.train.optimizer import AdamW

BEFORE, AFTER = 5, 4
"""Rollouts of the two stages of reinforcement learning."""


def tiny() -> fdl.Config:
    """4 supervised steps, 5 rollouts on two digits, 4 on three; evaluations every 2 rollouts, checkpoints every 3."""
    policy = fdl.Config(
        TransformerConfig, vocab_size=16, width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_size=8, mlp_width=16
    )
    optimizer = fdl.Config(AdamW, learning_rate=1e-2)
    warm_start = fdl.Config(Supervised, steps=4, batch_size=16, mixture={2: 1.0}, optimizer=optimizer)

    def stage(name: str, steps: int, digits: int) -> fdl.Config:
        return fdl.Config(
            Reinforce, name=name, steps=steps, objective=embedded.objective(), mixture={digits: 1.0},
            num_prompts=4, num_generations=4, optimizer=optimizer,
        )  # fmt: skip

    return fdl.Config(
        Experiment,
        name="tiny",
        task=fdl.Config(chain_sum_task),
        policy=policy,
        stages=(warm_start, stage("before", BEFORE, 2), stage("after", AFTER, 3)),
        evaluation=fdl.Config(
            Evaluation, mixture={2: 1.0, 4: 1.0}, every=2, num_prompts=8, final_num_prompts=16, num_samples=4
        ),
        checkpoint_every=3,
        eval_batch=4,
    )


KEPT = (0, 2, 3, 4, 6)
"""Rollouts that `keeping` keeps; stages begin at 0 and 5, and in 0, 2 and 6 some response is right."""


def keeping(*overrides: str) -> fdl.Config:
    """The tiny experiment, which keeps some rollouts; its second stage has an adaptive entropy bonus and a ledger."""
    config = tiny()
    config.stages[2].ledger = fdl.Config(Ledger, first_order_every=2)
    config.stages[2].objective = embedded.objective({"bonus": fdl.Config(adaptive_entropy)})
    return config_lib.apply_overrides(config, [f"keep_rollouts={KEPT}", *overrides])


def with_method(mechanisms: dict | None = None, name: str = "other", **parts: object) -> fdl.Config:
    """The tiny experiment with another method in both stages of reinforcement learning."""
    config = config_lib.apply_overrides(tiny(), [f"name={name}"])
    for stage in config.stages[1:]:
        stage.objective = embedded.objective(mechanisms, **parts)
    return config


class InterruptionError(Exception):
    """What ends training in `train_until`."""


def train_until(step: int, config: fdl.Config, out: Path) -> None:
    """Trains until the prompts of rollout `step` are due, as if the process had been interrupted there."""
    real, steps = stepper.put_prompts, iter(range(step + 1))

    def put_prompts(prompts, mesh):
        if next(steps) == step:
            raise InterruptionError
        return real(prompts, mesh)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stepper, "put_prompts", put_prompts)
        with pytest.raises(InterruptionError):
            loop.train(config, out, quiet=True)


@contextlib.contextmanager
def own_folders(base: Path) -> Iterator[Path]:
    """Lets datasets, warm starts and compiled programs live below `base`, one folder for all workers of a session.

    To save time the splits hold a few hundred rows.
    """
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JENTROPY_DATA", str(base / "jentropy_data"))
        patch.setenv("JENTROPY_CACHE", str(base / "jentropy_cache"))
        with pytest.MonkeyPatch.context() as small:
            small.setattr(chain_sum, "_NUM_SAMPLED", 300)
            small.setattr(chain_sum, "_NUM_DEMONSTRATIONS", 200)
            chain_sum.prepare("prompts")
            chain_sum.prepare("demonstrations")
            small.setattr(chain_sum_pairs, "_NUM_PAIRS", 200)
            storage.prepare(chain_sum_pairs.ChainSumPairs, "preferences")
        cache = jax.config.jax_compilation_cache_dir
        yield base
        jax.config.update("jax_compilation_cache_dir", cache)
