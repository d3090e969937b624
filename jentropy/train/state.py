"""All that a run carries from step to step, and that a checkpoint holds."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from jentropy.base import Array, Learner, Objective, Policy, State
from jentropy.samplers import Sampler, plain
from jentropy.train.optimizer import AdamW, init_optimizer, make_optimizer
from jentropy.train.sharding import param_shardings, replicated

STARTING = 4
"""What of the run's key is folded in for the parameters of second models; see also `step` and `programs`."""


@struct.dataclass(kw_only=True)
class TrainState:
    """The state of a run between two rollouts.

    Attributes:
      step: int32 scalar, rollouts so far.
      params: the policy's parameters.
      opt_state: the optimizer's state, of the current stage.
      mechanism_state: `{name: state}` of the chain, hyper-parameters included.
      estimator_state: the estimator's state.
      frozen: parameters without gradient by name, such as `reference`.
      learners: states of second models by name.
      decode_state: the sampler's state, hyper-parameters included; advances once per rollout.
      key: the run's key; never split, every draw folds (stage, step, row) into it.
    """

    step: Array
    params: Any
    opt_state: Any
    mechanism_state: State
    estimator_state: State
    frozen: Mapping[str, Any]
    learners: Mapping[str, State]
    decode_state: State
    key: Array


def new_stage(
    params: Any, step: Array, key: Array, objective: Objective, optimizer: AdamW, reference: bool,
    sampler: Sampler | None = None, reward_weights: tuple[float, ...] | None = None,
    learners: Mapping[str, Learner] | None = None,
) -> TrainState:  # fmt: skip
    """The state in which a stage starts: its own optimizer, mechanism, estimator and sampler state.

    Args:
      params: parameters the stage starts from.
      step: int32 scalar, rollouts so far.
      key: the run's key.
      objective: the stage's method.
      optimizer: the stage's optimizer.
      reference: whether to keep the parameters as the frozen reference policy.
      sampler: how tokens are drawn; None for `samplers.plain()`.
      reward_weights: of the task's reward columns, for an estimator that has none of its own; None: all 1.
      learners: second models by name.
    """
    first = jax.random.fold_in(jax.random.fold_in(key, STARTING), step)
    begun = enumerate((learners or {}).items())
    return TrainState(
        step=step,
        params=params,
        opt_state=init_optimizer(optimizer, params),
        mechanism_state=objective.mechanisms.init(),
        estimator_state=objective.estimator.init(reward_weights),
        frozen={"reference": jax.tree.map(jnp.copy, params)} if reference else {},
        learners={name: learner.init(jax.random.fold_in(first, i), params) for i, (name, learner) in begun},
        decode_state=(sampler or plain()).init(),
        key=key,
    )


def optimizer_shardings(policy: Policy, mesh: Mesh, optimizer: AdamW, opt_state: Any) -> Any:
    """Shardings for an optimizer's state (arrays or shapes): what mirrors parameters lies like them."""
    return optax.tree_utils.tree_map_params(
        make_optimizer(optimizer), lambda _, sharding: sharding, opt_state, param_shardings(policy, mesh),
        transform_non_params=lambda _: replicated(mesh),
    )  # fmt: skip


def state_shardings(policy: Policy, mesh: Mesh, optimizer: AdamW, state: TrainState) -> TrainState:
    """Shardings for `state` (arrays or shapes): parameters and what mirrors them by rule, the rest replicated."""
    params = param_shardings(policy, mesh)
    structure = jax.tree.structure(params)

    def is_policy(tree: Any) -> bool:
        return jax.tree.structure(tree) == structure

    shardings = jax.tree.map(lambda _: replicated(mesh), state)
    return shardings.replace(
        params=params,
        opt_state=optimizer_shardings(policy, mesh, optimizer, state.opt_state),
        frozen={name: params for name in state.frozen},
        learners=jax.tree.map(
            lambda tree: params if is_policy(tree) else replicated(mesh), state.learners, is_leaf=is_policy
        ),
    )
