"""AdamW with global-norm clipping and a warm-up/cosine schedule, described by one hashable dataclass."""

import dataclasses
import functools

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


def _schedule(config: AdamW) -> optax.Schedule:
    peak = config.learning_rate
    if config.decay_steps:
        return optax.warmup_cosine_decay_schedule(
            0.0 if config.warmup_steps else peak,
            peak,
            config.warmup_steps,
            config.decay_steps,
            end_value=peak * config.final_fraction,
        )
    if config.warmup_steps:
        return optax.linear_schedule(0.0, peak, config.warmup_steps)
    return optax.constant_schedule(peak)


@functools.lru_cache
def make_optimizer(config: AdamW) -> optax.GradientTransformation:
    """The optax transformation of `config`; equal settings give the same object."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            _schedule(config), b1=config.b1, b2=config.b2, eps=config.epsilon, weight_decay=config.weight_decay
        ),
    )
