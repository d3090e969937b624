"""Smoke test: every part of a run once, nothing learned.

GRPO (2402.03300) with Clip-Cov (2505.22617) through a short SHIFT: 60 steps of warm start, 6 rollouts before the shift
and 4 after it, evaluations on 32 prompts.

Command:  jentropy train experiments/configs/smoke.py --out runs/smoke
Hardware: two CPU cores. Cost: about one minute, most of it compilation and the preparation of the data.
"""

import fiddle as fdl

from jentropy.embedded import scaled_clip_cov, shift


def get_config() -> fdl.Config:
    """The experiment: SHIFT with fewer steps and prompts."""
    config = shift("smoke", {"clip_cov": scaled_clip_cov()})
    warm_start, before, after = config.stages
    warm_start.steps = warm_start.optimizer.decay_steps = 60
    warm_start.optimizer.warmup_steps = 10
    before.steps, after.steps = 6, 4
    config.evaluation.every, config.evaluation.num_prompts, config.evaluation.final_num_prompts = 3, 32, 64
    return config
