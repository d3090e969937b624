"""Seed-GRPO: smaller advantages for prompts whose answers disagree."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp

from jentropy import outcome, stats
from jentropy.base import Array, Mechanism, Plan, Rollouts, Signals, hyper, require

_FORMS = ("linear", "exponential", "focal")
_ESTIMATORS = ("discrete", "shannon", "mc")


class SemanticEntropyState(NamedTuple):
    """The sensitivity to the entropy, and the exponent of the focal form, scalars."""

    semantic_entropy_alpha: Array
    focal_gamma: Array


class Clusters(NamedTuple):
    """Which rows answered alike; `[B, B]` bool. Rows that do not take part have no peers.

    Attributes:
      peer: rows of one group that take part.
      alike: peers with the same answer.
      leads: `[B]` bool, the row of lowest id of each cluster.
      first: `[B]` bool, the row of lowest id of each group.
    """

    peer: Array
    alike: Array
    leads: Array
    first: Array


def clusters(batch: Rollouts, unparsed: str) -> Clusters:
    """The clusters of answers of every group; a row without a token or not valid does not take part."""
    if "answer_id" not in batch.row_data:
        raise ValueError(f"semantic_entropy needs row_data['answer_id'], got {sorted(batch.row_data)}")
    answer = jnp.maximum(batch.row_data["answer_id"], -1)
    used = outcome.valid_rows(batch) & jnp.any(batch.loss_mask, axis=1)
    peer = used[:, None] & used[None, :] & (batch.group[:, None] == batch.group[None, :])
    alike = peer & (answer[:, None] == answer[None, :])
    if unparsed == "own":
        alike &= (answer >= 0)[:, None] | jnp.eye(answer.size, dtype=bool)
    earlier = batch.row_id[None, :] < batch.row_id[:, None]
    leads, first = (used & ~jnp.any(same & earlier, axis=1) for same in (alike, peer))
    return Clusters(peer, alike, leads, first)


def _log_sum_exp(x: Array, mask: Array) -> Array:
    """Of `x` `[B]` over the mask `[B, B]` of each row; 0 for an empty one."""
    largest = jnp.max(jnp.where(mask, x[None, :], -jnp.inf), axis=1, keepdims=True)
    largest = jnp.where(jnp.isfinite(largest), largest, 0.0)
    total = jnp.sum(jnp.where(mask, jnp.exp(jnp.where(mask, x[None, :] - largest, 0.0)), 0.0), axis=1)
    return jnp.where(total > 0.0, jnp.log(jnp.where(total > 0.0, total, 1.0)) + largest[:, 0], 0.0)


def semantic_entropies(score: Array, found: Clusters, estimator: str) -> Array:
    """The semantic entropy of each row's group, `[B]`, nats, before it is bounded.

    Args:
      score: `[B]` log of the probability, up to a constant of the group, of each row; ignored for `"discrete"`.
      found: the clusters.
      estimator: see `semantic_entropy`.
    """
    score = jnp.zeros_like(score) if estimator == "discrete" else score
    used, whole = jnp.any(found.peer, axis=1), _log_sum_exp(score, found.peer)
    one_cluster = jnp.all(found.alike == found.peer, axis=1)
    log_p = jnp.where(one_cluster, 0.0, jnp.minimum(_log_sum_exp(score, found.alike) - whole, 0.0))
    if estimator == "mc":
        weight = found.leads.astype(score.dtype)
        weight /= jnp.maximum(jnp.sum(jnp.where(found.peer, weight[None, :], 0.0), axis=1), 1.0)
    else:
        weight = jnp.where(used, jnp.exp(jnp.where(used, score - whole, 0.0)), 0.0)
    return -jnp.sum(jnp.where(found.peer, (weight * log_p)[None, :], 0.0), axis=1)


@dataclasses.dataclass(frozen=True)
class _Update:
    estimator: str
    form: str
    unparsed: str
    length_normalised: bool

    def _factor(self, x: Array, gamma: Array) -> Array:
        if self.form == "exponential":
            return jnp.exp(-x)
        return 1.0 - x if self.form == "linear" else jnp.power(1.0 - x, gamma)

    def __call__(
        self, plan: Plan, state: SemanticEntropyState, signals: Signals, key: Array
    ) -> tuple[Plan, SemanticEntropyState]:
        del key
        batch, dtype = signals.batch, plan.advantage.dtype
        alpha, gamma = (x.astype(dtype) for x in state)
        found = clusters(batch, self.unparsed)
        total = stats.masked_mean if self.length_normalised else stats.masked_sum
        score = total(batch.logp_old, batch.loss_mask, 1).astype(dtype)
        largest = jnp.log(jnp.maximum(jnp.sum(found.peer, axis=1, dtype=dtype), 1.0))
        entropy = jnp.clip(semantic_entropies(score, found, self.estimator), 0.0, largest)
        ratio = jnp.where(largest > 0.0, entropy / jnp.where(largest > 0.0, largest, 1.0), 0.0)
        factor = self._factor(alpha * ratio, gamma)
        plan = plan.replace(advantage=jnp.where(batch.loss_mask, plan.advantage * factor[:, None], plan.advantage))
        groups = jnp.sum(found.first, dtype=dtype)
        return plan.report(
            semantic_entropy__entropy=(stats.masked_sum(entropy, found.first), groups),
            semantic_entropy__factor=(stats.masked_sum(factor, found.first), groups),
        ), state


def semantic_entropy(
    *,
    semantic_entropy_alpha: float = 0.5,
    estimator: str = "discrete",
    form: str = "linear",
    unparsed: str = "own",
    length_normalised: bool = False,
    focal_gamma: float = 2.0,
) -> Mechanism:
    """Multiplies the advantages of a group by a factor that falls with the entropy of its answers.

        A'_i = A_i · f(α SE / log G),   SE clipped to [0, log G],   G rows in the group

    The rows of a group with one `row_data["answer_id"]` are a cluster C_k of probability p_k. With one cluster, or one
    row, the factor is 1. Rows that are not valid or have no response token do not take part.

    The paper's SE is the Monte Carlo form, with sums of sequence probabilities that are not normalised: hundreds of
    nats, no p_k. `"mc"` and `"shannon"` normalise them over the group. The paper's advantage is R - mean R, without
    the standard deviation: `grpo(scale_rewards="none")`. Only the abstract and the formulas were at hand and no code is
    released: the defaults of α and γ are ours.

    Args:
      semantic_entropy_alpha: α, at least 0; at most 1 unless the form is `"exponential"`. 0 is the identity.
      estimator: `"discrete"`: -Σ p_k log p_k with p_k the fraction of the rows; `"shannon"`: the same with p_k the sum
        of softmax(log π_old(o_i)) over the rows of C_k; `"mc"`: -1/K Σ_k log p_k with these, which is no entropy.
      form: f(x): `"linear"`, 1 - x; `"exponential"`, exp(-x); `"focal"`, (1 - x)^γ.
      unparsed: rows with a negative `answer_id`: each its `"own"` cluster, or all of a group in one, `"shared"`.
      length_normalised: softmax over the means instead of the sums of the tokens' log-probabilities.
      focal_gamma: γ, finite and above 0.

    Raises:
      ValueError: a value is out of range or, when traced, `answer_id` is missing.

    Reference: 2505.12346.

    >>> semantic_entropy(semantic_entropy_alpha=0.1).update == semantic_entropy().update
    True
    """
    alpha, top = semantic_entropy_alpha, float("inf") if form == "exponential" else 1.0
    require(form in _FORMS, "form", form, f"one of {list(_FORMS)}")
    require(estimator in _ESTIMATORS, "estimator", estimator, f"one of {list(_ESTIMATORS)}")
    require(unparsed in ("own", "shared"), "unparsed", unparsed, "own or shared")
    require(0.0 <= alpha <= top and alpha < float("inf"), "semantic_entropy_alpha", alpha, f"in [0, {top:g}], finite")
    require(0.0 < focal_gamma < float("inf"), "focal_gamma", focal_gamma, "finite and above 0")
    return Mechanism(
        init=lambda: SemanticEntropyState(hyper(semantic_entropy_alpha), hyper(focal_gamma)),
        update=_Update(estimator, form, unparsed, length_normalised),
        requires=("answer_id",),
    )
