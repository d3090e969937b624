"""The papers' full recipes by name: each function returns an `Objective`, `COMPANIONS` the rest of the recipe.

    from jentropy import presets
    stage = fdl.Config(Reinforce, objective=fdl.Config(presets.dapo), num_generations=16, ...)

What cannot stand in an objective (group size, dynamic sampling, learning rate) is in `COMPANIONS` under the preset's
name, as far as it is known: without it the recipe is not the paper's. The keyword arguments are the numbers one would
sweep. `RESCALE` says what a batch of a few hundred tokens must change (a run of the papers has some 10⁵ to 10⁶).
"""

from collections.abc import Callable, Mapping
from typing import Any

from jentropy import normalisers, surrogates
from jentropy.advantages.gdpo import gdpo as gdpo_advantage
from jentropy.advantages.grpo import grpo
from jentropy.advantages.qae import qae as qae_advantage
from jentropy.advantages.raft import raft
from jentropy.advantages.raft import reinforce_rej as reinforce_rej_advantage
from jentropy.base import Mechanism, Objective
from jentropy.compose import chain
from jentropy.mechanisms.adaptive_entropy import adaptive_entropy
from jentropy.mechanisms.clip_cov import clip_cov
from jentropy.mechanisms.clip_range import clip_range
from jentropy.mechanisms.entropy_advantage import entropy_advantage
from jentropy.mechanisms.kl_cov import kl_cov
from jentropy.mechanisms.semantic_entropy import semantic_entropy
from jentropy.mechanisms.siren import siren as siren_mechanism
from jentropy.mechanisms.top_entropy import top_entropy


def _clipped(epsilon_low: float, epsilon_high: float, **mechanisms: Mechanism) -> Mechanism:
    return chain(clip_range=clip_range(epsilon_low=epsilon_low, epsilon_high=epsilon_high), **mechanisms)


def dapo(*, epsilon_low: float = 0.2, epsilon_high: float = 0.28, clip_ratio_c: float = 10.0) -> Objective:
    """DAPO: GRPO's advantage, clip-higher, the mean over all tokens of the batch.

    The dual clip of 10 is of the released scripts, not of the paper. Dynamic sampling and overlong shaping are fields
    of the stage and of the task: without them (`COMPANIONS["dapo"]`) it is not DAPO.

    Args:
      epsilon_low, epsilon_high: see `clip_range`.
      clip_ratio_c: see `surrogates.dual_clip`.

    Reference: 2503.14476.
    """
    surrogate = surrogates.dual_clip(clip_ratio_c=clip_ratio_c)
    return Objective(grpo(), _clipped(epsilon_low, epsilon_high), surrogate, normalisers.token_mean)


def clip_cov_7b(*, clip_cov_ratio: float = 2e-4, clip_cov_lb: float = 1.0, clip_cov_ub: float = 5.0) -> Objective:
    """Clip-Cov as in the authors' script for 7B: the ratio is clipped to [0, 2] only.

    The paper has no clipping outside the selected tokens; the scripts emulate that with both ε = 1.

    Args:
      clip_cov_ratio, clip_cov_lb, clip_cov_ub: see `clip_cov`.

    Reference: 2505.22617, section 4.2.
    """
    selection = clip_cov(clip_cov_ratio=clip_cov_ratio, clip_cov_lb=clip_cov_lb, clip_cov_ub=clip_cov_ub)
    mechanisms = _clipped(1.0, 1.0, clip_cov=selection)
    return Objective(grpo(), mechanisms, surrogates.ratio, normalisers.token_mean)


def _kl_cov(kl_cov_ratio: float, ppo_kl_coef: float) -> Objective:
    mechanisms = chain(kl_cov=kl_cov(kl_cov_ratio=kl_cov_ratio, ppo_kl_coef=ppo_kl_coef))
    return Objective(grpo(), mechanisms, surrogates.ratio, normalisers.token_mean)


def kl_cov_7b(*, kl_cov_ratio: float = 2e-3, ppo_kl_coef: float = 1.0) -> Objective:
    """KL-Cov as in the authors' script for 7B: 0.2 % of the tokens, no clipping of the ratio.

    Args:
      kl_cov_ratio, ppo_kl_coef: see `kl_cov`.

    Reference: 2505.22617, section 4.2.
    """
    return _kl_cov(kl_cov_ratio, ppo_kl_coef)


def kl_cov_32b(*, kl_cov_ratio: float = 2e-4, ppo_kl_coef: float = 1.0) -> Objective:
    """KL-Cov as in the authors' script for 32B: 0.02 % of the tokens.

    Args:
      kl_cov_ratio, ppo_kl_coef: see `kl_cov`.

    Reference: 2505.22617, section 4.2.
    """
    return _kl_cov(kl_cov_ratio, ppo_kl_coef)


def eighty_twenty(*, top_entropy_quantile: float = 0.2) -> Objective:
    """The 80/20 rule: DAPO with a policy gradient for the fifth of the tokens with the highest entropy only.

    Args:
      top_entropy_quantile: see `top_entropy`.

    Reference: 2506.01939.
    """
    mechanisms = _clipped(0.2, 0.28, top_entropy=top_entropy(top_entropy_quantile=top_entropy_quantile))
    return Objective(grpo(), mechanisms, surrogates.dual_clip(clip_ratio_c=10.0), normalisers.token_mean)


def entropy_advantage_grpo(*, entropy_adv_alpha: float = 0.4, entropy_adv_kappa: float = 2.0) -> Objective:
    """GRPO with entropy-shaped advantages.

    Args:
      entropy_adv_alpha, entropy_adv_kappa: see `entropy_advantage`.

    Reference: 2506.14758.
    """
    shaping = entropy_advantage(entropy_adv_alpha=entropy_adv_alpha, entropy_adv_kappa=entropy_adv_kappa)
    return Objective(grpo(), _clipped(0.2, 0.2, entropy_advantage=shaping), surrogates.ratio, normalisers.token_mean)


def siren(*, max_response_length: int, beta: float = 0.005, top_p: float = 0.8, tau: float = 0.8) -> Objective:
    """SIREN with the companions of its script: advantages without standard deviation, clip-higher, a fixed length.

    Args:
      max_response_length: the constant that token sums are divided by, tokens.
      beta, top_p, tau: see `mechanisms.siren`.

    Reference: 2509.25133.
    """
    mechanisms = _clipped(0.2, 0.28, siren=siren_mechanism(beta=beta, top_p=top_p, tau=tau))
    normaliser = normalisers.fixed_length(length=max_response_length)
    return Objective(grpo(scale_rewards="none"), mechanisms, surrogates.ratio, normaliser)


def skywork_or1(*, entropy_target: float = 0.2) -> Objective:
    """Skywork-OR1: GRPO with the adaptive entropy coefficient of its released scripts.

    Its scripts: steps of 1e-4, at most 5e-3, from 0; the paper's text and TRL have steps of 5e-3, the scripts' cap.

    Args:
      entropy_target: see `adaptive_entropy`, nats.

    Reference: 2505.22312.
    """
    controller = adaptive_entropy(
        entropy_target=entropy_target, entropy_coef_init=0.0, entropy_coef_delta=1e-4, entropy_coef_min=0.0,
        entropy_coef_max=5e-3,
    )  # fmt: skip
    mechanisms = _clipped(0.2, 0.2, adaptive_entropy=controller)
    return Objective(grpo(), mechanisms, surrogates.ratio, normalisers.token_mean)


def seed_grpo(*, semantic_entropy_alpha: float = 1.0) -> Objective:
    """Seed-GRPO: advantages without standard deviation, smaller where the answers to a prompt disagree.

    Needs `answer_id` of the task.

    Args:
      semantic_entropy_alpha: see `semantic_entropy`.

    Reference: 2505.12346.
    """
    scale = semantic_entropy(semantic_entropy_alpha=semantic_entropy_alpha)
    mechanisms = _clipped(0.2, 0.2, semantic_entropy=scale)
    return Objective(grpo(scale_rewards="none"), mechanisms, surrogates.ratio, normalisers.token_mean)


def qae(*, quantile_k: float = 0.4) -> Objective:
    """A quantile of the group's rewards as baseline, not divided by a standard deviation, with the loss of `dapo`.

    The released code keeps the standard deviation and interpolates: `advantages.qae` has both as options.

    Args:
      quantile_k: see `advantages.qae`.

    Reference: 2509.22611.
    """
    surrogate = surrogates.dual_clip(clip_ratio_c=10.0)
    return Objective(qae_advantage(quantile_k=quantile_k), _clipped(0.2, 0.28), surrogate, normalisers.token_mean)


def gdpo(*, reward_weights: tuple[float, ...] | None = None) -> Objective:
    """GDPO: each reward standardised in its group before they are added.

    Args:
      reward_weights: see `advantages.gdpo`.

    Reference: 2601.05242.
    """
    estimator = gdpo_advantage(reward_weights=reward_weights)
    return Objective(estimator, _clipped(0.2, 0.2), surrogates.ratio, normalisers.token_mean)


def dr_grpo(*, max_response_length: int) -> Objective:
    """Dr. GRPO: no standard deviation, token sums divided by one constant length.

    Args:
      max_response_length: tokens.

    Reference: 2503.20783.
    """
    normaliser = normalisers.fixed_length(length=max_response_length)
    return Objective(grpo(scale_rewards="none"), _clipped(0.2, 0.2), surrogates.ratio, normaliser)


def raft_pp(*, rewards: str = "signed") -> Objective:
    """RAFT++: positive responses only, with PPO's clipped ratio and verl's dual clip.

    Args:
      rewards: see `advantages.raft.raft`; "binary" for rewards of 0 and 1.

    Reference: 2504.11343.
    """
    surrogate = surrogates.dual_clip(clip_ratio_c=3.0)
    return Objective(raft(rewards=rewards), _clipped(0.2, 0.2), surrogate, normalisers.token_mean)


def reinforce_rej(*, rewards: str = "signed") -> Objective:
    """Reinforce-Rej: raw rewards of ±1, prompts that are all right or all wrong left out, no ratio.

    Args:
      rewards: see `advantages.raft.reinforce_rej`; "binary" maps rewards of 0 and 1 to ±1.

    Reference: 2504.11343.
    """
    estimator = reinforce_rej_advantage(rewards=rewards)
    return Objective(estimator, chain(), surrogates.reinforce, normalisers.token_mean)


PRESETS: Mapping[str, Callable[..., Objective]] = {
    preset.__name__: preset
    for preset in (
        dapo, clip_cov_7b, kl_cov_7b, kl_cov_32b, eighty_twenty, entropy_advantage_grpo, siren, skywork_or1, seed_grpo,
        qae, gdpo, dr_grpo, raft_pp, reinforce_rej,
    )
}  # fmt: skip
"""All recipes by name."""

_DAPO: Mapping[str, Any] = {
    "num_prompts": 512,
    "num_generations": 16,
    "num_minibatches": 16,
    "num_epochs": 1,
    "learning_rate": 1e-6,
    "dynamic_sampling": {"max_num_gen_batches": 10},
    "overlong_reward": {"max_length": 20480, "overlong_buffer_length": 4096, "overlong_buffer_penalty": 1.0},
}
_COVARIANCE: Mapping[str, Any] = {
    "num_prompts": 256, "num_generations": 8, "num_minibatches": 8, "num_epochs": 1, "learning_rate": 5e-7,
    "dynamic_sampling": {"max_num_gen_batches": 10},
}  # fmt: skip

COMPANIONS: Mapping[str, Mapping[str, Any]] = {
    "dapo": _DAPO,
    "clip_cov_7b": _COVARIANCE,
    "kl_cov_7b": _COVARIANCE,
    "kl_cov_32b": _COVARIANCE,
    "eighty_twenty": _DAPO,
    "entropy_advantage_grpo": {},
    "siren": {},
    "skywork_or1": {},
    "seed_grpo": {},
    "qae": {},
    "gdpo": {},
    "dr_grpo": {},
    "raft_pp": {"num_prompts": 1024, "num_generations": 4, "num_minibatches": 4, "num_epochs": 1,
                "learning_rate": 1e-6},
    "reinforce_rej": {"num_prompts": 1024, "num_generations": 4, "num_minibatches": 4, "num_epochs": 1,
                      "learning_rate": 1e-6},
}  # fmt: skip
"""Of each preset the rest of its recipe, as far as it is known here: fields of a stage and of its optimizer."""

_FRACTION = "selects less than one token of some 500 in an update: .03 to .1 acts"
RESCALE: Mapping[str, str] = {
    "dapo": "the learning rate; clip-higher at .28 acts on a few tokens in a thousand, .5 is barely visible",
    "clip_cov_7b": f"clip_cov_ratio = 2e-4 {_FRACTION}; covariances reach 10 to 20 there, so the band is (1, 50)",
    "kl_cov_7b": f"kl_cov_ratio = 2e-3 {_FRACTION}; two or more updates per rollout",
    "kl_cov_32b": f"kl_cov_ratio = 2e-4 {_FRACTION}; two or more updates per rollout",
    "eighty_twenty": "responses of a few tokens have no forking minority: .5 and more",
    "entropy_advantage_grpo": "nothing",
    "siren": "beta = .005 is lost beside a policy gradient at 500 times the learning rate: .1; tau = .6",
    "skywork_or1": "steps of 1e-4 reach their cap after 50 rollouts only: .003, a cap of .05; a target below the start",
    "seed_grpo": "nothing",
    "qae": "nothing",
    "gdpo": "nothing",
    "dr_grpo": "max_response_length: that of the task",
    "raft_pp": "the learning rate; rewards of 0 and 1 need rewards='binary'",
    "reinforce_rej": "the learning rate; rewards of 0 and 1 need rewards='binary'",
}
"""Of each preset what must be scaled for a batch of a few hundred tokens, and why."""
