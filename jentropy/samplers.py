"""Samplers: at which temperature, and among which tokens, a policy is decoded.

A temperature rule gives each token its own temperature; the rollout keeps it in `token_data["temperature"]`, so that
sampler, trainer and reference all score that token at the temperature it was drawn with, and ratios stay unbiased.
Truncation (`top_k`, `top_p`) is different: log-probabilities and entropies are those of the whole distribution, as in
every reference implementation, so importance ratios do not know of it.

Numbers travel in the state, which is a part of the training state and advances once per rollout. Entropies are in nats.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jentropy import features, stats
from jentropy.base import Array, State, hyper, require
from jentropy.temperature_control import E3State, e3_step


class Statistics(NamedTuple):
    """What is known of a rollout when its sampler advances.

    Attributes:
      entropy: scalar, mean over the response tokens of the entropy of the distribution each was drawn from, at its own
        temperature and before truncation.
      temperature: scalar, the objective's.
    """

    entropy: Array
    temperature: Array


Temperature: TypeAlias = Callable[[Array, State, Array], Array]
Keep: TypeAlias = Callable[[Array, State], Array]


def _no_state() -> tuple[()]:
    return ()


def _unchanged(state: State, statistics: Statistics) -> State:
    del statistics
    return state


class Sampler(NamedTuple):
    """How tokens are drawn; all but `init` compares equal for settings that differ in numbers only.

    Attributes:
      init: `() -> State`.
      temperature: `(logits [B, V], state, the objective's temperature []) -> [B]`, above 0; -inf marks tokens that
        cannot be drawn. None: the objective's, for every token.
      keep: `(logits / temperature [B, V], state) -> [B, V]` bool, the tokens that may be drawn, at least one in a row.
        None: all.
      advance: `(state, Statistics) -> state`, once per rollout.
    """

    init: Callable[[], State]
    temperature: Temperature | None = None
    keep: Keep | None = None
    advance: Callable[[State, Statistics], State] = _unchanged


def plain() -> Sampler:
    """Every token at the objective's temperature, from the whole distribution.

    >>> plain().init()
    ()
    """
    return Sampler(_no_state)


def compiled_part(sampler: Sampler) -> Sampler:
    """The sampler without its numbers: what a program is compiled for."""
    return sampler._replace(init=_no_state)


# Truncation.


class TopKState(NamedTuple):
    """k, an int32 scalar."""

    k: Array


def _keep_top_k(logits: Array, state: TopKState) -> Array:
    legal = logits != -jnp.inf
    rank = jnp.sum(legal, axis=-1, dtype=jnp.int32) - state.k
    threshold = jax.vmap(stats.order_statistic)(logits, legal, rank)
    return legal & (logits >= threshold[:, None])


def top_k(*, k: int) -> Sampler:
    """Draws among the k most probable tokens; those tied with the last one are kept.

    The threshold is found by counting, without a sort. Log-probabilities do not know of it.

    Args:
      k: at least 1.

    Raises:
      ValueError: k is out of range.
    """
    require(1 <= k <= np.iinfo(np.int32).max, "k", k, "at least 1 and an int32")
    return Sampler(lambda: TopKState(jnp.asarray(k, jnp.int32)), keep=_keep_top_k)


class TopPState(NamedTuple):
    """p, a scalar."""

    p: Array


def _keep_top_p(logits: Array, state: TopPState) -> Array:
    return features.nucleus_mask(logits, state.p) | ((logits != -jnp.inf) & (state.p >= 1.0))


def top_p(*, p: float) -> Sampler:
    """Draws from the nucleus: the smallest set of most probable tokens whose probability is at least p.

    The probabilities are those at the token's temperature. Tokens tied with the last one are kept. Log-probabilities
    do not know of it. See `features.nucleus_mask`.

    Args:
      p: in (0, 1]; 1 keeps every token.

    Raises:
      ValueError: p is out of range.
    """
    require(0.0 < p <= 1.0, "p", p, "in (0, 1]")
    return Sampler(lambda: TopPState(hyper(p)), keep=_keep_top_p)


# Temperatures.


def _require_temperature(name: str, value: float) -> None:
    require(0.0 < value < float("inf"), name, value, "positive and finite")


class EntropyTemperatureState(NamedTuple):
    """Temperature at and above the threshold, temperature below it, the threshold: scalars."""

    high: Array
    low: Array
    threshold: Array


def _by_threshold(logits: Array, state: EntropyTemperatureState, base: Array) -> Array:
    high, low, threshold = (x.astype(base.dtype) for x in state)
    return jnp.where(features.entropy(logits) >= threshold, high, low)


def entropy_temperature(*, high: float, low: float, threshold: float) -> Sampler:
    """Two temperatures: `T_t = high if H_t >= threshold else low`.

    H_t is the entropy of the token's whole distribution at temperature 1, before truncation. The objective's
    temperature is not used. 2506.01939 analyses decoding in this way, with a quantile of the entropies as threshold;
    it does not train with it.

    Args:
      high: where the entropy is high; positive, and larger or smaller than `low`.
      low: elsewhere; positive.
      threshold: nats, at least 0.

    Raises:
      ValueError: a value is out of range.

    Reference: 2506.01939, its analysis of decoding temperatures.
    """
    _require_temperature("high", high)
    _require_temperature("low", low)
    require(0.0 <= threshold < float("inf"), "threshold", threshold, "finite and at least 0")
    return Sampler(lambda: EntropyTemperatureState(hyper(high), hyper(low), hyper(threshold)), _by_threshold)


class LinearTemperatureState(NamedTuple):
    """The slope, the entropy at which the objective's temperature holds, the bounds: scalars."""

    slope: Array
    centre: Array
    low: Array
    high: Array


def _linear(logits: Array, state: LinearTemperatureState, base: Array) -> Array:
    slope, centre, low, high = (x.astype(base.dtype) for x in state)
    return jnp.clip(base + slope * (features.entropy(logits) - centre), low, high)


def linear_entropy_temperature(*, slope: float, centre: float, low: float, high: float) -> Sampler:
    """A temperature that is linear in the entropy: `T_t = clip(T + slope · (H_t - centre), low, high)`.

    T is the objective's temperature, H_t as in `entropy_temperature`.

    Args:
      slope: temperature per nat, finite; negative cools tokens of high entropy.
      centre: nats, at least 0.
      low, high: bounds, 0 < low <= high.

    Raises:
      ValueError: a value is out of range.
    """
    require(abs(slope) < float("inf"), "slope", slope, "finite")
    require(0.0 <= centre < float("inf"), "centre", centre, "finite and at least 0")
    _require_temperature("low", low)
    _require_temperature("high", high)
    require(low <= high, "low", low, f"at most high = {high}")
    return Sampler(lambda: LinearTemperatureState(hyper(slope), hyper(centre), hyper(low), hyper(high)), _linear)


def _e3_advance(state: E3State, statistics: Statistics) -> E3State:
    return e3_step(state, statistics.entropy, statistics.temperature)


def _e3_temperature(logits: Array, state: E3State, base: Array) -> Array:
    temperature = jnp.where(state.step == 0, base, state.temperature.astype(base.dtype))
    return jnp.broadcast_to(temperature, logits.shape[:1])


def e3_temperature(
    *,
    vocab_size: int,
    target: float | None = None,
    init_steps: int = 1,
    num_steps: int | None = None,
    annealing_ratio: float = 0.4,
    annealing_factor: float = 0.9,
    low: float | None = 0.5,
    high: float | None = 2.0,
    min_entropy: float = 1e-6,
) -> Sampler:
    """E3: one temperature for all tokens, steered from rollout to rollout towards a target entropy.

        T_{k+1} = clip(T_k (1 + T_k ln(H* / max(H_k, min_entropy)) / (ln V + ln ln V)), low, high)

    H_k is the mean token entropy of rollout k at T_k; T_1 is the objective's temperature. The first `init_steps`
    rollouts change nothing: H* is the mean of their entropies, unless it is given. In the last `annealing_ratio` of
    `num_steps` rollouts (none, if that is less than one) a cosine takes H* down to `annealing_factor` times its value.

    The bounds and `min_entropy` are ours: the released code has none, and its temperature grows without limit once the
    entropy no longer follows it. None, None and 0 are the released form. After `num_steps` rollouts the target stays,
    where the released cosine would rise again.

    Args:
      vocab_size: V, at least 3.
      target: H*, nats, positive; None for the mean of the first rollouts.
      init_steps: rollouts before the first change, at least 1.
      num_steps: rollouts of the stage, for the annealing; None for none (released: `enable_annealing`, `max_steps`).
      annealing_ratio: in [0, 1].
      annealing_factor: in (0, 1].
      low, high: bounds of the temperature, 0 < low <= high; None for no bound.
      min_entropy: nats, at least 0.

    Raises:
      ValueError: a value is out of range.

    Reference: 2505.18573, and its `TemperatureScheduler`.
    """
    require(vocab_size >= 3, "vocab_size", vocab_size, "at least 3")
    require(target is None or 0.0 < target < float("inf"), "target", target, "positive and finite, or None")
    require(init_steps >= 1, "init_steps", init_steps, "at least 1")
    require(num_steps is None or num_steps >= 1, "num_steps", num_steps, "at least 1, or None")
    require(0.0 <= annealing_ratio <= 1.0, "annealing_ratio", annealing_ratio, "in [0, 1]")
    require(0.0 < annealing_factor <= 1.0, "annealing_factor", annealing_factor, "in (0, 1]")
    for name, value in (("low", low), ("high", high)):
        require(value is None or 0.0 < value < float("inf"), name, value, "positive and finite, or None")
    require(low is None or high is None or low <= high, "low", low, f"at most high = {high}")
    require(0.0 <= min_entropy < float("inf"), "min_entropy", min_entropy, "finite and at least 0")
    annealed = 0 if num_steps is None else int(num_steps * annealing_ratio)
    begin = (num_steps or 0) - annealed if annealed else np.iinfo(np.int32).max
    ints = {"step": 0, "init_steps": init_steps, "begin": begin, "span": max(annealed, 1)}
    floats = {
        "temperature": 0.0,
        "total": 0.0,
        "target": target or 0.0,
        "scale": np.log(vocab_size) + np.log(np.log(vocab_size)),
        "final": annealing_factor,
        "low": -np.inf if low is None else low,
        "high": np.inf if high is None else high,
        "min_entropy": min_entropy,
    }

    def init() -> E3State:
        whole = {name: jnp.asarray(value, jnp.int32) for name, value in ints.items()}
        return E3State(given=jnp.asarray(target is not None), **whole, **{k: hyper(v) for k, v in floats.items()})

    return Sampler(init, _e3_temperature, advance=_e3_advance)


# Combination.


@dataclasses.dataclass(frozen=True)
class _CombinedTemperature:
    name: str
    temperature: Temperature

    def __call__(self, logits: Array, state: State, base: Array) -> Array:
        return self.temperature(logits, state[self.name], base)


@dataclasses.dataclass(frozen=True)
class _CombinedKeep:
    names: tuple[str, ...]
    keeps: tuple[Keep, ...]

    def __call__(self, logits: Array, state: State) -> Array:
        for name, keep in zip(self.names, self.keeps):
            logits = jnp.where(keep(logits, state[name]), logits, -jnp.inf)
        return logits != -jnp.inf


@dataclasses.dataclass(frozen=True)
class _CombinedAdvance:
    names: tuple[str, ...]
    advances: tuple[Callable[[Any, Statistics], Any], ...]

    def __call__(self, state: State, statistics: Statistics) -> State:
        return {name: advance(state[name], statistics) for name, advance in zip(self.names, self.advances)}


def combine(**samplers: Sampler) -> Sampler:
    """At most one temperature rule and any number of truncations, in order: each sees what the one before it left.

    So `combine(top_k=top_k(k=50), top_p=top_p(p=0.9))` takes the nucleus of the renormalised 50. The state is
    `{name: state}`.

    Args:
      **samplers: samplers by name; none is `plain`, with another state.

    Raises:
      ValueError: two of them set the temperature.

    >>> combine(top_p=top_p(p=0.9)).temperature is None
    True
    """
    rules = [(name, sampler.temperature) for name, sampler in samplers.items() if sampler.temperature is not None]
    names = [name for name, _ in rules]
    require(len(rules) <= 1, "samplers", names, "at most one that sets the temperature")
    keeps = [(name, sampler.keep) for name, sampler in samplers.items() if sampler.keep is not None]
    return Sampler(
        lambda: {name: sampler.init() for name, sampler in samplers.items()},
        _CombinedTemperature(*rules[0]) if rules else None,
        _CombinedKeep(tuple(name for name, _ in keeps), tuple(keep for _, keep in keeps)) if keeps else None,
        _CombinedAdvance(tuple(samplers), tuple(sampler.advance for sampler in samplers.values())),
    )
