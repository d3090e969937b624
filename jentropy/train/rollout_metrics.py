"""What is known of a rollout before its updates: entropy, covariance, score, lengths, agreement with the sampler."""

import jax.numpy as jnp

from jentropy import outcome, stats
from jentropy.base import Array, Metrics, Quantities, Rollouts


def _temperature(rows: Rollouts) -> Metrics:
    """The mean temperature of the response tokens, where it is the sampler's."""
    if "temperature" not in rows.token_data:
        return {}
    temperature = rows.token_data["temperature"]
    total = stats.masked_sum(temperature, rows.loss_mask)
    return {"sampler/temperature": (total, jnp.sum(rows.loss_mask, dtype=temperature.dtype))}


def rollout_metrics(rows: Rollouts, scores: Quantities, advantage: Array) -> Metrics:
    """What is known of a rollout before its updates, as `(sum, count)`.

    `actor/entropy` is the mean over tokens of the full-vocabulary entropy at the sampling temperature (verl, TRL);
    `entropy/sequence_mean` averages each response first (arXiv 2505.22617, the x axis of the law). `cov/mean` is the
    token covariance of log-probability and advantage over the rollout. `critic/score/mean` is the mean over valid rows
    of the sum of their rewards (verl). Lengths are those before overlong filtering; rows that pad a rollout, which are
    not valid and have no token, are left out.
    """
    mask, one = rows.loss_mask, jnp.ones((), advantage.dtype)
    tokens, lengths = stats.masked_sum(mask.astype(advantage.dtype), mask), jnp.sum(mask, axis=1)
    entropy = jnp.where(mask, scores["entropy"], 0.0)
    nonempty = lengths > 0
    per_row = jnp.sum(entropy, axis=1) / jnp.maximum(lengths, 1).astype(entropy.dtype)
    mismatch = jnp.where(mask, jnp.abs(rows.logp_old - rows.logp_sampler), 0.0)
    num_rows = jnp.sum(nonempty).astype(advantage.dtype)
    sampled = rows.row_data.get("response_length", lengths)
    is_row = outcome.valid_rows(rows) | (sampled > 0)
    some = jnp.any(is_row).astype(advantage.dtype)
    rewards = jnp.where(outcome.valid_rewards(rows), rows.rewards, 0.0)
    return {
        "actor/entropy": (jnp.sum(entropy), tokens),
        "entropy/sequence_mean": (jnp.sum(jnp.where(nonempty, per_row, 0.0)), num_rows),
        "cov/mean": (stats.masked_covariance(scores["log_prob"], advantage, mask), one),
        "sampler/logp_diff_max": (jnp.max(mismatch), one),
        "sampler/logp_diff_relative": (jnp.max(mismatch / jnp.maximum(jnp.abs(rows.logp_old), 1.0)), one),
        "sampler/logp_diff_mean": (jnp.sum(mismatch), tokens),
        "critic/score/mean": (jnp.sum(rewards), jnp.sum(outcome.valid_rows(rows), dtype=rewards.dtype)),
        "response_length/mean": (jnp.sum(sampled).astype(advantage.dtype), jnp.sum(is_row, dtype=advantage.dtype)),
        "response_length/max": (jnp.max(sampled).astype(advantage.dtype), some),
        "response_length/min": (jnp.min(jnp.where(is_row, sampled, mask.shape[1])).astype(advantage.dtype), some),
        **_temperature(rows),
    }
