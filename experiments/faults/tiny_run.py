"""The run that the fault matrix kills, stops and doubles: every kind of stage, 60 rollouts, a checkpoint every 5.

Command:  jentropy train experiments/faults/tiny_run.py --out runs/tiny
Hardware: one CPU core. Cost: some ten seconds, nearly all of them imports and compilation.
"""

import fiddle as fdl

from jentropy import embedded


def get_config() -> fdl.Config:
    """SHIFT with a model, batches and stages as small as they can be."""
    config = embedded.shift("tiny", {"clip_cov": embedded.scaled_clip_cov()})
    config.policy.width, config.policy.num_layers, config.policy.mlp_width = 16, 1, 16
    config.policy.num_heads, config.policy.num_kv_heads, config.policy.head_size = 2, 1, 8
    warm_start, before, after = config.stages
    warm_start.steps = warm_start.optimizer.decay_steps = 100
    warm_start.batch_size, warm_start.optimizer.warmup_steps = 16, 10
    for stage, steps in ((before, 40), (after, 20)):
        stage.steps, stage.num_prompts, stage.num_generations = steps, 8, 4
    evaluation = config.evaluation
    evaluation.every, evaluation.num_prompts, evaluation.final_num_prompts, evaluation.num_samples = 10, 16, 16, 2
    config.checkpoint_every, config.eval_batch = 5, 16
    return config
