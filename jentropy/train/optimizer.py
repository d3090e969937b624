"""AdamW with global-norm clipping and a warm-up/cosine schedule, described by one hashable dataclass."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jentropy.base import require


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Settings of the optimizer.

    Attributes:
      learning_rate: peak learning rate, > 0.
      b1, b2, epsilon: Adam's moments, in [0, 1), and the term added to the root.
      weight_decay: decoupled, >= 0.
      clip_norm: largest global gradient norm, > 0.
      warmup_steps: updates of linear warm-up from 0; 0 is none.
      decay_steps: updates after which a cosine has decayed the rate to `final_fraction` of it; 0 is constant.
      final_fraction: in [0, 1].
    """

    learning_rate: float = 5e-4
    b1: float = 0.9
    b2: float = 0.98
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    warmup_steps: int = 0
    decay_steps: int = 0
    final_fraction: float = 0.05

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "positive")
        require(0 <= self.b1 < 1, "b1", self.b1, "in [0, 1)")
        require(0 <= self.b2 < 1, "b2", self.b2, "in [0, 1)")
        require(self.epsilon > 0, "epsilon", self.epsilon, "positive")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "at least 0")
        require(self.clip_norm > 0, "clip_norm", self.clip_norm, "positive")
        require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "at least 0")
        require(
            self.decay_steps == 0 or self.decay_steps > self.warmup_steps,
            "decay_steps",
            self.decay_steps,
            f"0 or more than warmup_steps = {self.warmup_steps}",
        )
        require(0 <= self.final_fraction <= 1, "final_fraction", self.final_fraction, "in [0, 1]")


def _relative_schedule(config: AdamW) -> optax.Schedule:
    """The learning rate over its peak, by update."""
    if config.decay_steps:
        return optax.warmup_cosine_decay_schedule(
            0.0 if config.warmup_steps else 1.0, 1.0, config.warmup_steps, config.decay_steps, config.final_fraction
        )
    if config.warmup_steps:
        return optax.linear_schedule(0.0, 1.0, config.warmup_steps)
    return optax.constant_schedule(1.0)


@functools.lru_cache
def _transformation(config: AdamW) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.epsilon),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_schedule(_relative_schedule(config)),
        optax.inject_hyperparams(optax.scale)(step_size=-1.0),
    )


def compiled_part(config: AdamW) -> AdamW:
    """What of `config` is compiled into a step: all but the peak learning rate, which is part of the state."""
    return dataclasses.replace(config, learning_rate=1.0)


def make_optimizer(config: AdamW) -> optax.GradientTransformation:
    """The optax transformation; settings that differ in the learning rate only give the same object.

    Its state starts at a learning rate of 1: use `init_optimizer`.
    """
    return _transformation(compiled_part(config))


def init_optimizer(config: AdamW, params: Any) -> Any:
    """The optimizer's state for `params`, at the peak learning rate of `config`."""
    with jax.numpy_dtype_promotion("standard"):
        state: Any = make_optimizer(config).init(params)
    return set_learning_rate(config, state)


def set_learning_rate(config: AdamW, opt_state: Any) -> Any:
    """The optimizer's state at the peak learning rate of `config`; moments and counts are as they were."""
    *rest, scale = opt_state
    step_size = jnp.full_like(scale.hyperparams["step_size"], -config.learning_rate)
    return (*rest, scale._replace(hyperparams={"step_size": step_size}))


def propose(config: AdamW, gradient: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
    """The change of the parameters that one update makes, before it is rounded into them, and the new state."""
    with jax.numpy_dtype_promotion("standard"):
        return make_optimizer(config).update(gradient, opt_state, params)


def apply_optimizer(config: AdamW, gradient: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
    """One update: returns new parameters and state."""
    updates, opt_state = propose(config, gradient, opt_state, params)
    with jax.numpy_dtype_promotion("standard"):
        return optax.apply_updates(params, updates), opt_state
