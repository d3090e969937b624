"""ETPO: entropy-regularised policy optimisation with a soft Q over the vocabulary, one value per token.

    maximise Σ γ^k (R_k - β D_KL(π ‖ ρ)),   V(s) = Σ_v π(v|s) (Q(s, v) - β (log π(v|s) - log ρ(v|s)))

with ρ the frozen reference. A state is the text so far, an action is a response (or one turn of it), and rewards come
at its last token. Inside an action nothing is discounted. Losses beside plan and surrogate, since they need the whole
distribution of three models at every token: sums over tokens with a weight fixed beforehand, so the number of
micro-batches changes nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jentropy import stats
from jentropy.base import Array, Metrics, hyper, require
from jentropy.soft_value import Heads, LinearHead, action_values, soft_bellman_targets, soft_value, soft_values

_COMPATS = ("consistent", "released")


def state_loss(
    pi_logits: Array, rho_logits: Array, q: Array, beta: Array | float, *, compat: str = "consistent"
) -> Array:
    """The policy's loss in each state on plain logits, `[...]`: what `policy_loss` sums, and the released form of it.

    `"consistent"` is Σ_v π_v (β (log π_v - log ρ_v) - Q_v) = -V. `"released"` is what the authors' code computes,
    (1/n) Σ_v (β log π_v - Q_v) over all n ids: Q has no gradient and no weight there, so the gradient β (1/n - π_v)
    knows nothing of the reward and sharpens every policy; ρ is absent. It is here to be compared with, and no loss of
    `etpo` uses it.

    Raises:
      ValueError: `compat` is unknown.
    """
    require(compat in _COMPATS, "compat", compat, f"one of {_COMPATS}")
    if compat == "consistent":
        return -soft_value(pi_logits, rho_logits, q, beta)
    log_pi = jax.nn.log_softmax(pi_logits)
    return jnp.mean(jnp.asarray(beta, log_pi.dtype) * log_pi - jax.lax.stop_gradient(q), axis=-1)


def huber(error: Array, delta: Array | float, *, compat: str = "consistent") -> Array:
    """e² / 2 up to |e| = δ, then δ (|e| - δ / 2); same shape as `error`.

    `compat="released"` gives 0 where e < -δ, as the authors' code does: Q is never pulled down from far above its
    target. No loss of `etpo` uses it.

    Raises:
      ValueError: `compat` is unknown.
    """
    require(compat in _COMPATS, "compat", compat, f"one of {_COMPATS}")
    size, delta = jnp.abs(error), jnp.asarray(delta, error.dtype)
    inside = jnp.minimum(size, delta)
    loss = inside * (size - inside / 2.0)
    return loss if compat == "consistent" else jnp.where(error < -delta, 0.0, loss)


class EtpoState(NamedTuple):
    """β, γ, Huber's δ and the share that the target critic keeps, scalars."""

    beta: Array
    gamma: Array
    huber_delta: Array
    polyak: Array


class Etpo(NamedTuple):
    """The parts of an ETPO update, in this order: targets, the losses of critic and policy, `track`.

    Attributes:
      init: `() -> EtpoState`.
      targets: see `targets`.
      q_loss: see `q_loss`.
      policy_loss: see `policy_loss`.
      track: see `track`.
    """

    init: Callable[[], EtpoState]
    targets: Callable[..., Array]
    q_loss: Callable[[EtpoState, LinearHead, Array, Array, Array, Array], tuple[Array, Metrics]]
    policy_loss: Callable[..., tuple[Array, Metrics]]
    track: Callable[[EtpoState, Any, Any], Any]


def targets(
    state: EtpoState,
    heads: Heads,
    reward: Array,
    mask: Array,
    *,
    action_end: Array | None = None,
    bootstrap: Array | None = None,
    temperature: Array | float = 1.0,
    vocab_mask: Array | None = None,
    chunk_columns: int | None = None,
) -> Array:
    """`soft_bellman_targets` with `soft_values`, `[B, T]`, without gradient; `heads.critic` is the target critic."""
    value = soft_values(
        heads, mask, state.beta, temperature=temperature, vocab_mask=vocab_mask, chunk_columns=chunk_columns
    )
    reward = reward.astype(value.dtype)
    found = soft_bellman_targets(value, reward, mask, state.gamma, action_end=action_end, bootstrap=bootstrap)
    return jax.lax.stop_gradient(found)


def q_loss(
    state: EtpoState, critic: LinearHead, tokens: Array, target: Array, mask: Array, weight: Array
) -> tuple[Array, Metrics]:
    """Σ weight · Huber(y - Q(token)), differentiable in the critic.

    Args:
      state: δ is read.
      critic: Q, the one that learns.
      tokens: `[B, T]` int32.
      target: `[B, T]` float, see `targets`.
      mask: `[B, T]` bool.
      weight: `[B, T]` float of the whole batch, such as `normalisers.token_mean` of the mask.

    Returns:
      The loss, and as means over tokens `critic/vf_loss`, `critic/vpred_mean` and `critic/huber_clipfrac`, the share of
      errors above δ.
    """
    value = action_values(critic, tokens, mask)
    error = jnp.where(mask, target.astype(value.dtype), 0.0) - value
    loss = huber(error, state.huber_delta)
    far = jnp.abs(error) > state.huber_delta.astype(error.dtype)
    means = {"critic/vf_loss": loss, "critic/vpred_mean": value, "critic/huber_clipfrac": far.astype(loss.dtype)}
    return _weighted(loss, mask, weight), _means(means, mask)


def policy_loss(
    state: EtpoState,
    heads: Heads,
    mask: Array,
    weight: Array,
    *,
    temperature: Array | float = 1.0,
    vocab_mask: Array | None = None,
    chunk_columns: int | None = None,
) -> tuple[Array, Metrics]:
    """Σ weight · Σ_v π_v (β (log π_v - log ρ_v) - Q_v) = -Σ weight · V, differentiable in `heads.policy` only.

    Args:
      state: β is read.
      heads: the three models; `critic` is the one that learns.
      mask: `[B, T]` bool.
      weight: `[B, T]` float of the whole batch.
      temperature: as in `soft_values`, like the rest.
      vocab_mask: optional `[V]` bool.
      chunk_columns: columns of a chunk.

    Returns:
      The loss, and the mean of V over tokens, `actor/soft_value`.
    """
    value = soft_values(
        heads, mask, state.beta, temperature=temperature, vocab_mask=vocab_mask, chunk_columns=chunk_columns
    )
    return -_weighted(value, mask, weight), _means({"actor/soft_value": value}, mask)


def _weighted(x: Array, mask: Array, weight: Array) -> Array:
    return jnp.sum(jnp.where(mask, weight, 0.0).astype(x.dtype) * x)


def _means(values: dict[str, Array], mask: Array) -> Metrics:
    count = stats.count_true(mask)
    return {k: (jax.lax.stop_gradient(stats.masked_sum(x, mask)), count.astype(x.dtype)) for k, x in values.items()}


def track(state: EtpoState, target_params: Any, params: Any) -> Any:
    """The target critic after an update of the critic: `polyak · target + (1 - polyak) · params`, leaf by leaf.

    Keep the target in float32: in bfloat16 most steps of 0.5 % are rounded away.
    """

    def mix(target: Array, new: Array) -> Array:
        kept = state.polyak.astype(target.dtype)
        return kept * target + (1.0 - kept) * new.astype(target.dtype)

    return jax.tree.map(mix, target_params, params)


def etpo(*, beta: float = 0.01, gamma: float = 0.99, huber_delta: float = 10.0, polyak: float = 0.995) -> Etpo:
    """The hyper-parameters of ETPO and the functions that read them.

    An update: `targets` with the target critic, then gradient steps on `q_loss` and `policy_loss`, then `track`. With
    exact Q the policy's optimum is π ∝ ρ exp(Q / β): a larger β keeps it closer to ρ, and so keeps ρ's entropy.

    The authors train both models with Lion at 1e-6 and gradients clipped at 10, in minibatches of whole responses.

    Args:
      beta: β, finite and above 0: price of the divergence from ρ, in units of reward per nat.
      gamma: γ in [0, 1], per action, not per token.
      huber_delta: δ of Huber's loss, above 0; inf is half the squared error.
      polyak: share that the target critic keeps in each update, in [0, 1]; 0 has no separate target.

    Raises:
      ValueError: a value is out of range.

    Reference: 2402.06700. The released code (github.com/morning9393/ETPO) differs: see `state_loss`, `huber`,
    `soft_value` and `soft_bellman_targets`.

    >>> etpo(beta=0.1).q_loss == etpo(gamma=1.0).q_loss
    True
    """
    require(0.0 < beta < float("inf"), "beta", beta, "finite and above 0")
    require(0.0 <= gamma <= 1.0, "gamma", gamma, "in [0, 1]")
    require(huber_delta > 0.0, "huber_delta", huber_delta, "above 0")
    require(0.0 <= polyak <= 1.0, "polyak", polyak, "in [0, 1]")

    def init() -> EtpoState:
        return EtpoState(hyper(beta), hyper(gamma), hyper(huber_delta), hyper(polyak))

    return Etpo(init, targets, q_loss, policy_loss, track)
