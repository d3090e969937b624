"""The embedded experiments: a task, a warm start and settings in which entropy collapse shows on two cores.

Chained addition with two strategies (see `data/chain_sum.py`), a Llama-type policy of 99,648 parameters and two
settings: LAW, where reward is bought with entropy until both are spent, and SHIFT, where the task changes after the
entropy is gone. Everything here is a `fdl.Config`, so that config files and the command line can change it.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import fiddle as fdl

from jentropy.advantages.fr3e import fr3e
from jentropy.advantages.grpo import grpo
from jentropy.advantages.s_grpo import s_grpo
from jentropy.advantages.vine import vine
from jentropy.base import Objective
from jentropy.compose import chain
from jentropy.data.task import chain_sum_exits_task, chain_sum_task, easy_mixture
from jentropy.mechanisms.clip_cov import clip_cov
from jentropy.mechanisms.clip_range import clip_range
from jentropy.mechanisms.entropy_bonus import entropy_bonus
from jentropy.normalisers import sequence_mean_token_mean, token_mean
from jentropy.policy.transformer import TransformerConfig
from jentropy.preference import h_dpo
from jentropy.rewards.shaping import overlong_reward
from jentropy.rollout.dynamic import DynamicSampling
from jentropy.rollout.fr3e import Fr3e
from jentropy.rollout.s_grpo import SerialExits
from jentropy.rollout.vine import Vine
from jentropy.surrogates import dual_clip, ratio
from jentropy.train.experiment import Evaluation, Experiment, Reinforce, Supervised
from jentropy.train.optimizer import AdamW
from jentropy.train.preference_stage import Prefer

SHIFT_STEP = 200
"""Rollouts before the task changes in the SHIFT setting."""


def policy() -> fdl.Config:
    """The laptop policy: width 64, 2 layers, 4 heads, untied head, 99,648 parameters."""
    return fdl.Config(
        TransformerConfig,
        vocab_size=16, width=64, num_layers=2, num_heads=4, num_kv_heads=4, head_size=16, mlp_width=168,
    )  # fmt: skip


def warm_start(*, strategy_prior: float, seed: int = 0, steps: int = 600) -> fdl.Config:
    """Supervised learning of both strategies, noisy, with a probability of the step-by-step one."""
    return fdl.Config(
        Supervised,
        steps=steps,
        batch_size=256,
        mixture=easy_mixture(0.2),
        optimizer=fdl.Config(
            AdamW, learning_rate=3e-3, b2=0.999, weight_decay=0.01, warmup_steps=100, decay_steps=steps
        ),
        options={"strategy_prior": strategy_prior},
        seed=seed,
    )


def objective(mechanisms: Mapping[str, fdl.Config] | None = None, **parts: Any) -> fdl.Config:
    """GRPO with a token-mean loss, the ratio clipped at 0.2, and further mechanisms after the clip range.

    Args:
      mechanisms: configs of mechanisms by name; one named `clip_range` replaces that of GRPO.
      **parts: other fields of `Objective`, such as `estimator`, instead of GRPO's.
    """
    standard = {"estimator": fdl.Config(grpo, epsilon=1e-4), "surrogate": ratio, "normaliser": token_mean}
    chained = {"clip_range": fdl.Config(clip_range), **copy.deepcopy(dict(mechanisms or {}))}
    return fdl.Config(Objective, mechanisms=fdl.Config(chain, **chained), **{**standard, **copy.deepcopy(parts)})


def reinforce(
    name: str, steps: int, mixture: Mapping[int, float], method: fdl.Config, learning_rate: float
) -> fdl.Config:
    """A stage of 32 prompts x 8 responses and 2 x 2 updates per rollout."""
    optimizer = fdl.Config(AdamW, learning_rate=learning_rate)
    return fdl.Config(Reinforce, name=name, steps=steps, objective=method, mixture=mixture, optimizer=optimizer)


def law(
    name: str = "law_grpo",
    mechanisms: Mapping[str, fdl.Config] | None = None,
    *,
    warm_start_seed: int = 0,
    steps: int = 100,
    seed: int = 0,
    **parts: Any,
) -> fdl.Config:
    """LAW: both strategies are likely in the warm start, and plain GRPO spends all entropy for reward.

    Args:
      name: of the run.
      mechanisms: what is added to plain GRPO; see `objective`.
      warm_start_seed: of the supervised stage, in which each strategy has probability .5.
      steps: rollouts.
      seed: of reinforcement learning.
      **parts: see `objective`.
    """
    return fdl.Config(
        Experiment,
        name=name,
        task=fdl.Config(chain_sum_task),
        policy=policy(),
        stages=(
            warm_start(strategy_prior=0.5, seed=warm_start_seed),
            reinforce("law", steps, easy_mixture(0.2), objective(mechanisms, **parts), 2e-4),
        ),
        evaluation=fdl.Config(Evaluation, mixture=easy_mixture(0.2), every=5),
        seed=seed,
    )


def shift(
    name: str, mechanisms: Mapping[str, fdl.Config] | None = None, *, warm_start_seed: int = 0, seed: int = 0,
    **parts: Any,
) -> fdl.Config:  # fmt: skip
    """SHIFT: 200 rollouts on two-digit prompts, where a shortcut is enough, then 100 where chains are needed.

    Args:
      name: of the run.
      mechanisms: what is added to plain GRPO; see `objective`.
      warm_start_seed: of the supervised stage, in which chains are rare (prior .03).
      seed: of reinforcement learning. The defaults are one pair of the eight in `experiments/results/ablation.md` in
        which GRPO, Clip-Cov and the entropy bonus take their median number of steps to adapt, 40, 20 and 10.
      **parts: see `objective`.
    """
    return fdl.Config(
        Experiment,
        name=name,
        task=fdl.Config(chain_sum_task),
        policy=policy(),
        stages=(
            warm_start(strategy_prior=0.03, seed=warm_start_seed),
            reinforce("before_shift", SHIFT_STEP, {2: 1.0}, objective(mechanisms, **parts), 5e-4),
            reinforce("after_shift", 100, easy_mixture(0.1), objective(mechanisms, **parts), 5e-4),
        ),
        evaluation=fdl.Config(Evaluation, mixture=easy_mixture(0.1)),
        seed=seed,
    )


def preferences(
    name: str, *, alpha: float, beta: float = 0.5, warm_start_seed: int = 0, steps: int = 100, seed: int = 0
) -> fdl.Config:
    """H-DPO on pairs of right and wrong chains, from the warm start of LAW: what α does to entropy.

    Args:
      name: of the run.
      alpha: weight of the policy's own entropy: below 1 sharper, above 1 flatter than DPO.
      beta: β; responses have 3 to 7 tokens, so it is far above the paper's .01.
      warm_start_seed: of the supervised stage, in which each strategy has probability .5.
      steps: of 64 pairs.
      seed: of the order of the pairs.
    """
    stage = fdl.Config(
        Prefer, steps=steps, loss=fdl.Config(h_dpo, alpha=alpha, beta=beta), mixture=easy_mixture(0.2),
        optimizer=fdl.Config(AdamW, learning_rate=2e-4),
    )  # fmt: skip
    config = law(name, warm_start_seed=warm_start_seed, seed=seed)
    config.stages = (config.stages[0], stage)
    return config


def scaled_clip_cov() -> fdl.Config:
    """Clip-Cov for some 500 tokens an update: .03 of them with a covariance in (1, 50).

    The paper's fraction, 2e-4, would select less than one token here, and its band (1, 5) misses the extremes.
    """
    return fdl.Config(clip_cov, clip_cov_ratio=0.03, clip_cov_lb=1.0, clip_cov_ub=50.0)


def scaled_entropy_bonus() -> fdl.Config:
    """An entropy bonus of .03 per token."""
    return fdl.Config(entropy_bonus, entropy_coef=0.03)


def scaled_dapo(setting: Callable[..., fdl.Config], name: str) -> fdl.Config:
    """LAW or SHIFT with all parts of DAPO, for 32 prompts and responses of at most 7 tokens.

    Once a task is learnt most groups are all right: at most 4 rounds, then places are padded. The overlong buffer is
    the last token, which a right chain of six digits needs: it costs .1.

    Args:
      setting: `law` or `shift`.
      name: of the run.
    """
    mechanisms = {"clip_range": fdl.Config(clip_range, epsilon_high=0.28)}
    config = setting(name, mechanisms, surrogate=fdl.Config(dual_clip, clip_ratio_c=10.0))
    sampling = fdl.Config(DynamicSampling, metric="chain_sum", max_num_gen_batches=4, on_exhausted="pad")
    shaping = fdl.Config(overlong_reward, max_length=7, overlong_buffer_length=1, overlong_buffer_penalty=0.1)
    for stage in config.stages[1:]:
        stage.dynamic_sampling, stage.shaping = copy.deepcopy((sampling, (shaping,)))
        stage.mask_truncated = True
    return config


def scaled_fr3e(setting: Callable[..., fdl.Config], name: str) -> fdl.Config:
    """LAW or SHIFT with FR3E: 16 prompts, 8 rows from each, and from each of 2 anchors of the first response.

    Args:
      setting: `law` or `shift`.
      name: of the run.
    """
    mechanisms = {"clip_range": fdl.Config(clip_range, epsilon_high=0.28)}
    config = setting(name, mechanisms, estimator=fdl.Config(fr3e))
    for stage in config.stages[1:]:
        stage.num_prompts, stage.strategy = 16, fdl.Config(Fr3e, num_anchors=2)
    return config


def scaled_vine(setting: Callable[..., fdl.Config], name: str) -> fdl.Config:
    """LAW or SHIFT with VinePPO: 4 responses from each prefix.

    Args:
      setting: `law` or `shift`.
      name: of the run.
    """
    config = setting(name, estimator=fdl.Config(vine))
    for stage in config.stages[1:]:
        stage.strategy = fdl.Config(Vine, num_rollouts=4)
    return config


def scaled_s_grpo(name: str) -> fdl.Config:
    """LAW with S-GRPO on chained addition with exits: 64 prompts, three exits and the full response of each.

    Args:
      name: of the run.
    """
    config = law(name, estimator=fdl.Config(s_grpo), normaliser=sequence_mean_token_mean)
    config.task = fdl.Config(chain_sum_exits_task)
    stage = config.stages[1]
    stage.num_prompts, stage.num_generations, stage.strategy = 64, 4, fdl.Config(SerialExits)
    return config


def quickstart() -> dict[str, fdl.Config]:
    """The runs of `jentropy quickstart`: one LAW run, then three methods through the SHIFT setting.

    All four have the same chain, in which a method that is not used has its neutral setting: then they differ in
    numbers only, and share one compiled step.
    """
    off = {"clip_cov": fdl.Config(clip_cov, clip_cov_ratio=0.0), "entropy_bonus": fdl.Config(entropy_bonus)}
    return {
        "law_grpo": law(mechanisms=off),
        "shift_grpo": shift("shift_grpo", off),
        "shift_clip_cov": shift("shift_clip_cov", {**off, "clip_cov": scaled_clip_cov()}),
        "shift_entropy_bonus": shift("shift_entropy_bonus", {**off, "entropy_bonus": scaled_entropy_bonus()}),
    }
