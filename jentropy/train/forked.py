"""A strategy with the compiled programs of a stage: what grows from the responses to the prompts of a rollout."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jentropy.base import LOG_PROB, Array, Objective, Policy, Rollouts, State
from jentropy.data.source import Prompts
from jentropy.data.task import Task
from jentropy.rollout.forks import Prefixes
from jentropy.rollout.iid import RolloutSpec
from jentropy.rollout.strategy import Strategy, Tools
from jentropy.train.evaluate import grade_on_host
from jentropy.train.programs import make_growth
from jentropy.train.scoring import make_scorer
from jentropy.train.sharding import constrain_rows, replicated, row_sharding


@functools.lru_cache
def _compiled(function: Callable[..., tuple[Any, Any]], static: Any, mesh: Mesh) -> Callable[..., tuple[Any, Any]]:
    shardings = row_sharding(mesh), replicated(mesh)
    return jax.jit(functools.partial(function, static), out_shardings=shardings)


@functools.lru_cache
def _make_score(policy: Policy, temperature: float, mesh: Mesh) -> Callable[[Any, Rollouts], Array]:
    scorer = make_scorer(policy, (LOG_PROB,), temperature)
    return jax.jit(lambda params, rows: constrain_rows(scorer(params, {}, rows)["log_prob"], mesh))


def total_weights(objective: Objective, task_weights: tuple[float, ...] | None, num_rewards: int) -> np.ndarray:
    """The weights `[R]` of the reward columns in an objective's total reward: its estimator's own, or the task's."""
    state = objective.estimator.init(task_weights)
    weights = getattr(state, "reward_weights", jnp.ones(()))  # an estimator without any sums the columns
    return np.broadcast_to(np.asarray(jax.device_get(weights), np.float32), num_rewards)


class Forker:
    """Grows the rows of a stage's rollouts from their roots.

    Args:
      strategy: how.
      policy: the model.
      spec: of the roots; its continuations are `strategy.num_continuations`.
      num_generations: rows of a group.
      task: its graders, and its rules for steps and thoughts.
      mesh: devices.
      key: of sampling, that of the roots.
      weights: `[R]`, see `total_weights`.
    """

    def __init__(
        self, strategy: Strategy, policy: Policy, spec: RolloutSpec, num_generations: int, task: Task, mesh: Mesh,
        key: Array, weights: np.ndarray,
    ) -> None:  # fmt: skip
        self._strategy, self._task, self._mesh, self._key, self._weights = strategy, task, mesh, key, weights
        self._num_generations = num_generations
        self._size = strategy.num_continuations(num_generations)
        self._growth = make_growth(policy, spec._replace(num_generations=self._size), mesh)
        self._score = _make_score(policy, spec.temperature, mesh)

    def _run(self, function: Callable[..., tuple[Any, Any]], static: Any, *arrays: Any) -> tuple[Any, Any]:
        return _compiled(function, static, self._mesh)(*arrays)

    def _put(self, arrays: Any) -> Any:
        return jax.device_put(arrays, row_sharding(self._mesh))

    def __call__(
        self, params: Any, decode_state: State, index: Array, fields: Mapping[str, Array], prompts: Prompts,
        roots: Rollouts, entropy: Array,
    ) -> tuple[Rollouts, Mapping[str, tuple[Any, Any]]]:  # fmt: skip
        """The rows of a rollout and what the strategy says of them.

        Args:
          params: of the policy.
          decode_state: the sampler's.
          index: int32 scalar, the rollout's number.
          fields: `[P]` arrays on the devices, what device graders know of the prompts.
          prompts: the same prompts on the host.
          roots: graded; see `Strategy`.
          entropy: `[B, T]` of the roots.
        """

        def grow(prefixes: Prefixes, owner: np.ndarray, first_row: int) -> Rollouts:
            first = jax.device_put(np.int32(first_row), replicated(self._mesh))
            prefixes, on_devices = self._put((prefixes, np.asarray(owner, np.int32)))
            rows = self._growth(params, self._key, index, prefixes, on_devices, fields, first, decode_state)
            return grade_on_host(self._task, rows, prompts, np.repeat(owner, self._size))

        score = functools.partial(self._score, params)
        tools = Tools(grow, self._run, score, self._put, self._key, index, self._weights, self._num_generations)
        return self._strategy(roots, entropy, prompts, self._task, tools)
