"""One step of reinforcement learning as a whole: prompts, samples, rewards, updates; and the state it goes through."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jentropy.base import Learner, Metrics, Policy, Rollouts
from jentropy.data.source import Prompts
from jentropy.policy.transformer import transformer
from jentropy.rollout.dynamic import dynamic_rollouts
from jentropy.rollout.iid import RolloutSpec
from jentropy.samplers import plain
from jentropy.train.evaluate import grade_on_host, put_prompts
from jentropy.train.experiment import Experiment, Reinforce
from jentropy.train.filters import make_judge, make_mask, make_place, round_keys
from jentropy.train.forked import Forker, total_weights
from jentropy.train.preference_stage import Prefer
from jentropy.train.preference_step import PreferenceStepper, new_preference_stage
from jentropy.train.programs import make_rollout
from jentropy.train.quarantine import Batch
from jentropy.train.second_models import compiled_model
from jentropy.train.sharding import replicated
from jentropy.train.state import TrainState, new_stage, state_shardings
from jentropy.train.step import StepSpec, make_spec, make_train_step


def fresh_state(experiment: Experiment, index: int, params: Any, step: jax.Array, key: jax.Array) -> TrainState:
    """The state at the start of a stage, which is not supervised."""
    stage = experiment.stages[index]
    if isinstance(stage, Prefer):
        return new_preference_stage(params, step, key, stage)
    assert isinstance(stage, Reinforce), f"stage {index} has no training state"
    return new_stage(
        params, step, key, stage.objective, stage.optimizer, stage.reference, stage.sampler,
        experiment.reward_weights(stage), make_learners(experiment, stage),
    )  # fmt: skip


def make_learners(experiment: Experiment, stage: Reinforce) -> dict[str, Learner]:
    """The second models of a stage by name."""
    policy = transformer(experiment.policy)
    return {name: model.make(policy) for name, model in stage.learners.items()}


def state_template(experiment: Experiment, policy: Policy, mesh: Mesh, index: int) -> TrainState:
    """Shapes, dtypes and shardings of the state in a stage, which is not supervised."""
    key, step = jax.random.key(0), jax.ShapeDtypeStruct((), np.int32)
    fresh = functools.partial(fresh_state, experiment, index)
    shapes = jax.eval_shape(fresh, jax.eval_shape(policy.init, key), step, key)
    shardings = state_shardings(policy, mesh, experiment.stages[index].optimizer, shapes)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def stage_spec(experiment: Experiment, stage: Reinforce, policy: Policy) -> StepSpec:
    """What is compiled into the steps of a stage."""
    return make_spec(
        policy, stage.objective, stage.optimizer, reference=stage.reference, num_minibatches=stage.num_minibatches,
        num_epochs=stage.num_epochs, num_microbatches=stage.num_microbatches, sampler=stage.sampler,
        left_out=None if stage.eos_in_loss else experiment.task.tokenizer.eos_id, ledger=stage.ledger,
        learners={name: compiled_model(model).make(policy) for name, model in stage.learners.items()},
    )  # fmt: skip


def make_stepper(
    experiment: Experiment, stage: Reinforce | Prefer, policy: Policy, mesh: Mesh, key: jax.Array
) -> "Stepper | PreferenceStepper":
    """What does one step of a stage; see `Stepper`."""
    if isinstance(stage, Prefer):
        return PreferenceStepper(experiment.task, stage, policy, mesh, experiment.seed)
    return Stepper(experiment, stage, policy, mesh, key)


class Stepper:
    """One rollout and its updates, with the compiled programs of a stage; `train_step` is that of the updates.

    Args:
      experiment: the run.
      stage: of reinforcement learning.
      policy: the model.
      mesh: devices.
      key: of sampling.
    """

    def __init__(self, experiment: Experiment, stage: Reinforce, policy: Policy, mesh: Mesh, key: jax.Array) -> None:
        task, objective, strategy = experiment.task, stage.objective, stage.strategy
        rewards = (*task.rewards, *stage.shaping)
        num_roots = stage.num_generations if strategy is None else strategy.num_roots(stage.num_generations)
        sampler = RolloutSpec(
            num_roots, task.max_new_tokens, task.tokenizer.eos_id, task.tokenizer.pad_id,
            objective.temperature, rewards, sampler=stage.sampler or plain(),
            required=stage.required, answer_id=task.answer_id,
        )  # fmt: skip
        self._rollout = make_rollout(policy, sampler, mesh)
        self.train_step = make_train_step(stage_spec(experiment, stage, policy), stage.num_groups, mesh)
        self._source = task.prompts("train", stage.mixture)
        self._task, self._mesh, self._key = task, mesh, key
        self._seed, self._num_prompts = experiment.seed, stage.num_prompts
        self._mask = make_mask(mesh) if stage.mask_truncated else None
        self._forker = None
        if strategy is not None:
            weights = total_weights(objective, experiment.reward_weights(stage), len(rewards))
            self._forker = Forker(strategy, policy, sampler, stage.num_generations, task, mesh, key, weights)
        self._dynamic = stage.dynamic_sampling
        if self._dynamic is not None:
            self._keys = round_keys(key, self._dynamic.max_num_gen_batches, mesh)
            column = self._dynamic.column([reward.name for reward in task.rewards])
            self._judge, self._place = make_judge(column, stage.num_prompts, mesh), make_place(mesh)

    def _round(self, state: TrainState, step: int, draw: int, prompts: Prompts) -> Rollouts:
        """Graded rows of one round of sampling; only dynamic sampling has a second."""
        return self._grown(state, step, draw, prompts)[0]

    def _grown(
        self, state: TrainState, step: int, draw: int, prompts: Prompts
    ) -> tuple[Rollouts, Mapping[str, tuple[Any, Any]]]:
        """Graded responses to prompts and, with a strategy, what grows from them; what it says of itself."""
        index = jax.device_put(np.int32(step), replicated(self._mesh))
        tokens, length, fields = put_prompts(prompts, self._mesh)
        key = self._key if self._dynamic is None else self._keys[draw]
        rows, entropy = self._rollout(state.params, key, index, tokens, length, fields, state.decode_state)
        rows = grade_on_host(self._task, rows, prompts)
        if self._forker is None:
            return rows, {}
        return self._forker(state.params, state.decode_state, index, fields, prompts, rows, entropy)

    def _sample(self, state: TrainState, step: int) -> tuple[Rollouts, np.ndarray, Mapping[str, tuple[Any, Any]]]:
        """The rows of a rollout, the prompt of each group, and what sampling says of itself."""
        draw_prompts = functools.partial(self._source.batch, self._seed, step, self._num_prompts)
        if self._dynamic is None:
            prompts = draw_prompts()
            rows, said = self._grown(state, step, 0, prompts)
            return rows, prompts.example_id, said
        return dynamic_rollouts(
            draw_prompts, functools.partial(self._round, state, step), settings=self._dynamic,
            num_groups=self._num_prompts, judge=self._judge, place=self._place,
        )  # fmt: skip

    def __call__(self, state: TrainState, step: int) -> tuple[TrainState, Metrics, Batch]:
        """Advances `state`, which is donated, by the rollout number `step`; returns what the step was given, too."""
        rows, example_id, sampling = self._sample(state, step)
        if self._mask is not None:
            rows, masked = self._mask(rows)
            sampling = {**sampling, **masked}
        state, metrics = self.train_step(state, rows)
        return state, {**metrics, **sampling}, Batch(rows, example_id)
