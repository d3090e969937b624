"""PPO's advantages: rewards of a critic's temporal differences, discounted, with the divergence in the reward."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jentropy import outcome, stats
from jentropy.base import Array, Estimator, Metrics, Rollouts, hyper, require

_ERROR = "error/kl_horizon is not above a fifth of the number of rows"
_ROUNDING = 100.0
"""Machine epsilons, of the size of returns and values, within which returns are equal."""


class GaeState(NamedTuple):
    """The weights of the rewards, `[R]` or a scalar, and scalars: γ, λ, and the controller of β."""

    reward_weights: Array
    gamma: Array
    lam: Array
    kl_coef: Array
    kl_target: Array
    kl_horizon: Array


def generalised_advantage(
    token_reward: Array, value: Array, mask: Array, gamma: Array, lam: Array, bootstrap: Array
) -> Array:
    """A_t = δ_t + γ λ A_s with δ_t = r_t + γ V_s - V_t, s the next column of the mask in the row.

    Columns outside the mask are skipped: a hole in a response is no state of value 0.

    Args:
      token_reward: `[B, T]` float.
      value: `[B, T]` float, of the state before token t.
      mask: `[B, T]` bool.
      gamma: γ, a float scalar.
      lam: λ, a float scalar.
      bootstrap: `[B]` float, the value after the last token of the mask.

    Returns:
      `[B, T]`, 0 outside the mask.
    """
    chex.assert_rank([token_reward, value, mask, gamma, lam, bootstrap], [2, 2, 2, 0, 0, 1])
    chex.assert_equal_shape([token_reward, value, mask])
    dtype = token_reward.dtype
    gamma, decay = gamma.astype(dtype), (gamma * lam).astype(dtype)
    reward, value = jnp.where(mask, token_reward, 0.0), jnp.where(mask, value, 0.0)

    def step(later: tuple[Array, Array], column: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        next_value, next_advantage = later
        r, v, used = column
        now = r + gamma * next_value - v + decay * next_advantage
        return (jnp.where(used, v, next_value), jnp.where(used, now, next_advantage)), jnp.where(used, now, 0.0)

    _, advantage = jax.lax.scan(step, (bootstrap, jnp.zeros_like(bootstrap)), (reward.T, value.T, mask.T), reverse=True)
    return advantage.T


def adapted_kl_coef(kl_coef: Array, divergence: Array, num_rows: Array, target: Array, horizon: Array) -> Array:
    """β (1 + clip(KL / target - 1, -0.2, 0.2) · n / horizon): all are float scalars, n counts the rows of the rollout.

    Reference: 1909.08593, section 2.2.
    """
    error = jnp.clip(divergence / target - 1.0, -0.2, 0.2)
    return kl_coef * (1.0 + error * num_rows / horizon)


def _explained_variance(returns: Array, value: Array, used: Array) -> tuple[Array, Array]:
    """1 - var(R - V) / var(R) over the tokens, as `(sum, count)`: not counted where R is equal up to its rounding."""
    variance = stats.masked_variance(returns, used)
    square = stats.masked_mean(jnp.square(returns) + jnp.square(value), used)
    defined = variance > (_ROUNDING * float(jnp.finfo(returns.dtype).eps)) ** 2 * square
    explained = 1.0 - stats.masked_variance(returns - value, used) / jnp.where(defined, variance, 1.0)
    return jnp.where(defined, explained, 0.0), defined.astype(returns.dtype)


def _row_data(rollouts: Rollouts, name: str) -> Array:
    if name not in rollouts.row_data:
        raise ValueError(f"gae needs row_data[{name!r}], got {sorted(rollouts.row_data)}")
    return rollouts.row_data[name]


@dataclasses.dataclass(frozen=True)
class _Estimate:
    whiten: bool
    bootstrap: bool
    use_reference: bool
    adaptive: bool

    def _adapt(self, state: GaeState, divergence: Array, used: Array) -> tuple[GaeState, Metrics]:
        """The state of the next rollout, and what stops a run."""
        if not self.adaptive:
            return state, {}
        rows = jnp.any(used, axis=1)
        mean = stats.masked_mean(stats.masked_mean(divergence, used, axis=1), rows).astype(state.kl_coef.dtype)
        num_rows = jnp.sum(rows, dtype=mean.dtype)
        kl_coef = adapted_kl_coef(state.kl_coef, mean, num_rows, state.kl_target, state.kl_horizon)
        failed = (0.2 * num_rows >= state.kl_horizon).astype(divergence.dtype)
        return state._replace(kl_coef=kl_coef), {_ERROR: (failed, jnp.ones_like(failed))}

    def __call__(self, rollouts: Rollouts, state: GaeState) -> tuple[Array, Mapping[str, Array], Metrics, GaeState]:
        if "value" not in rollouts.token_data:
            raise ValueError(f"gae needs token_data['value'], got {sorted(rollouts.token_data)}")
        valid = outcome.valid_rows(rollouts)
        used = rollouts.loss_mask & valid[:, None]
        reward = outcome.total_reward(rollouts, state.reward_weights)
        dtype, one = reward.dtype, jnp.ones((), reward.dtype)
        token_reward, extra, new_state = jnp.where(outcome.last_token(used), reward[:, None], 0.0), {}, state
        if self.use_reference:
            divergence = outcome.log_ratio_to_reference(rollouts).astype(dtype)
            token_reward -= state.kl_coef.astype(dtype) * divergence
            new_state, error = self._adapt(state, divergence, used)
            extra = {**outcome.divergence_metrics(rollouts, divergence), **error}
            extra["actor/reward_kl_penalty_coeff"] = (state.kl_coef.astype(dtype), one)
        end = _row_data(rollouts, "bootstrap_value").astype(dtype) if self.bootstrap else jnp.zeros_like(reward)
        end = jnp.where(valid, end, 0.0)
        value = jnp.where(used, rollouts.token_data["value"].astype(dtype), 0.0)
        raw = generalised_advantage(token_reward, value, used, state.gamma, state.lam, end)
        returns = raw + value
        advantage = stats.whiten(raw, used) if self.whiten else raw
        num_tokens = jnp.sum(used, dtype=dtype)
        metrics = {
            **outcome.metrics(rollouts, reward, advantage),
            "critic/values/mean": (jnp.sum(value), num_tokens),
            "critic/returns/mean": (jnp.sum(returns), num_tokens),
            "critic/vf_explained_var": _explained_variance(returns, value, used),
        }
        return advantage, {"return": returns}, {**metrics, **extra}, new_state


def gae(
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    whiten: bool = True,
    kl_coef: float = 0.0,
    kl_target: float | None = None,
    kl_horizon: float = 1e4,
    bootstrap: bool = False,
    reward_weights: tuple[float, ...] | None = None,
) -> Estimator:
    """Generalised advantage estimation on the values of a critic; adds the returns that the critic learns from.

        r_t = 1[t last] R - β (logp_old_t - ref_log_prob_t)
        δ_t = r_t + γ V_{t+1} - V_t,   A_t = δ_t + γ λ A_{t+1},   return_t = A_t + V_t

    `token_data["value"]` is V, of the state before token t: column t knows the tokens before t only. The advantages are
    then whitened over all response tokens of the rollout (ddof 1); equal ones, or fewer than two, give 0. The added
    `token_data["return"]` is not whitened. Tokens of a response that are not trained on are skipped, in the recursion
    too. Rows with `row_data["is_valid"]` False do not take part and get 0. Groups play no part.

    After a response the value is 0, for a truncated response too, as in all released code; `bootstrap` takes it from
    `row_data["bootstrap_value"]`, which should be 0 for responses that ended by themselves.

    With `kl_target`, β is that of the first rollout, and follows the divergence KL, the mean over responses of their
    token mean, as in verl (the paper's is their sum):

        β <- β (1 + clip(KL / kl_target - 1, -0.2, 0.2) · n / kl_horizon),   n: rows with response tokens

    Reports `critic/vf_explained_var`, 1 - var(return - V) / var(return) (verl adds 1e-5 to the divisor; left out here
    if all returns are equal up to rounding), `critic/values/mean` and `critic/returns/mean`, and with β above 0
    `actor/reward_kl_penalty` (token mean, without β) and `actor/reward_kl_penalty_coeff`. verl leaves `-mean / std` on
    padding: 0 here.

    Args:
      gamma: γ, in [0, 1].
      lam: λ, in [0, 1]; 1 is the return minus the value.
      whiten: whether to whiten.
      kl_coef: β, finite and at least 0; above 0 it needs `token_data["ref_log_prob"]`.
      kl_target: the divergence that β is steered to, in nats per token and above 0, None for a fixed β. Needs a β above
        0. verl: `kl_ctrl.target_kl`, 0.1.
      kl_horizon: rows after which a divergence that is 20 % off has changed β by 20 %, above 0. A rollout of five
        times as many rows or more would turn the sign of β: the run stops.
      bootstrap: whether values after the last token are given.
      reward_weights: one number per reward column, None for the weights of the task's graders: the columns are summed
        first.

    Raises:
      ValueError: a value is out of range or, when traced, the number of weights is wrong or data is missing.

    Reference: 1506.02438, eq. 16; 1707.06347; the controller: 1909.08593; released code: verl 0.9.1, `gae`.

    >>> gae(lam=0.95).estimate == gae().estimate
    True
    """
    require(0.0 <= gamma <= 1.0, "gamma", gamma, "in [0, 1]")
    require(0.0 <= lam <= 1.0, "lam", lam, "in [0, 1]")
    require(0.0 <= kl_coef < float("inf"), "kl_coef", kl_coef, "finite and at least 0")
    require(kl_target is None or 0.0 < kl_target < float("inf"), "kl_target", kl_target, "finite and above 0")
    require(kl_target is None or kl_coef > 0.0, "kl_target", kl_target, "None if kl_coef is 0")
    require(0.0 < kl_horizon < float("inf"), "kl_horizon", kl_horizon, "finite and above 0")
    requires = {"ref_log_prob": kl_coef > 0.0, "bootstrap_value": bootstrap}

    def init(weights: tuple[float, ...] | None = None) -> GaeState:
        target = hyper(1.0 if kl_target is None else kl_target)
        weights_state = outcome.weights_state(reward_weights, weights)
        return GaeState(weights_state, hyper(gamma), hyper(lam), hyper(kl_coef), target, hyper(kl_horizon))

    return Estimator(
        init=init,
        estimate=_Estimate(whiten, bootstrap, use_reference=kl_coef > 0.0, adaptive=kl_target is not None),
        requires=("value", *(name for name, needed in requires.items() if needed)),
    )
