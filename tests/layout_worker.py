"""Sampling and whole training steps on eight CPU devices, laid out in several ways; writes what they came to.

Run by `layout_test.py` in a process of its own, since the number of devices is fixed when jax starts:
`python layout_worker.py OUT.npz [CHAIN ...]`. Keys of the file are `case:layout:what`.
"""

import functools
import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import covering
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from jentropy.advantages.grpo import grpo
from jentropy.advantages.rloo import rloo
from jentropy.base import ENTROPY, LOG_PROB, Objective, Rollouts, Signals
from jentropy.compose import chain
from jentropy.mechanisms.clip_cov import clip_cov
from jentropy.mechanisms.clip_range import clip_range
from jentropy.mechanisms.entropy_bonus import entropy_bonus
from jentropy.mechanisms.kl_cov import kl_cov
from jentropy.mechanisms.kl_reference import kl_reference
from jentropy.normalisers import sequence_mean_token_mean, token_mean
from jentropy.policy.transformer import TransformerConfig, transformer
from jentropy.preference import h_dpo
from jentropy.rewards.base import DeviceReward
from jentropy.rollout.iid import RolloutSpec
from jentropy.samplers import combine, e3_temperature, linear_entropy_temperature, plain, top_p
from jentropy.surrogates import ratio
from jentropy.train.ledger import Ledger
from jentropy.train.optimizer import AdamW, apply_optimizer
from jentropy.train.preference_stage import Prefer
from jentropy.train.preference_step import make_preference_step, new_preference_stage, preference_spec
from jentropy.train.programs import make_rollout
from jentropy.train.scoring import make_scorer
from jentropy.train.sharding import MeshShape, make_mesh, param_shardings, row_sharding
from jentropy.train.state import TrainState, new_stage, state_shardings
from jentropy.train.step import UPDATES, StepSpec, loss, make_spec, make_train_step, plan_update, select_valid

PROMPTS, GENERATIONS, PROMPT_COLUMNS, NEW_TOKENS = 8, 4, 4, 6
LAYOUTS = {"1x1x1": (1, 1, 1), "8x1x1": (8, 1, 1), "2x2x2": (2, 2, 2), "1x2x4": (1, 2, 4)}
OPTIMIZER = AdamW(learning_rate=2e-2, epsilon=1e-3)
"""A large epsilon: Adam would turn rounding of small gradients into steps."""

POLICY = transformer(
    TransformerConfig(
        vocab_size=16, width=32, num_layers=1, num_heads=8, num_kv_heads=4, head_size=4, mlp_width=32,
    )
)  # fmt: skip


def method(
    *,
    epsilon_high: float = 0.2,
    clip_cov_ratio: float = 0.0,
    kl_cov_coef: float = 0.0,
    entropy_coef: float = 0.0,
    k3: float = 0.0,
    full: float = 0.0,
    estimator: Any = None,
    normaliser: Any = token_mean,
) -> Objective:
    """One chain for all cases, in which only numbers change, so that each layout is compiled once."""
    mechanisms = chain(
        clip_range=clip_range(epsilon_high=epsilon_high),
        clip_cov=clip_cov(clip_cov_ratio=clip_cov_ratio, clip_cov_lb=0.05, clip_cov_ub=50.0),
        kl_cov=kl_cov(kl_cov_ratio=0.1, ppo_kl_coef=kl_cov_coef, keep_clip=True),
        entropy_bonus=entropy_bonus(entropy_coef=entropy_coef),
        k3=kl_reference(beta=k3),
        full=kl_reference(beta=full, estimator="full"),
    )
    return Objective(estimator or grpo(), mechanisms, ratio, normaliser, 0.9)


ALL = {"epsilon_high": 0.28, "clip_cov_ratio": 0.1, "kl_cov_coef": 0.5, "entropy_coef": 0.02, "k3": 0.05, "full": 0.05}
METHODS = {
    "grpo": method(),
    "clip_higher": method(epsilon_high=0.28),
    "clip_cov": method(clip_cov_ratio=0.1),
    "kl_cov": method(kl_cov_coef=0.5),
    "entropy_bonus": method(entropy_coef=0.02),
    "kl_k3": method(k3=0.05),
    "kl_full": method(full=0.05),
    "all": method(**ALL),
}


def _reward(tokens, mask, fields):
    """The share of response tokens below the row's threshold, rounded so that rewards tie."""
    low = jnp.sum(mask & (tokens < fields["threshold"][:, None]), axis=1, dtype=jnp.float32)
    return jnp.round(4.0 * low / jnp.sum(mask, axis=1, dtype=jnp.float32)) / 4.0


ON_DEMAND = frozenset({"answer_id", "greedy_reward"})
SAMPLER = RolloutSpec(GENERATIONS, NEW_TOKENS, 1, 0, 0.9, (DeviceReward("low", _reward),))
DECODING = combine(
    linear=linear_entropy_temperature(slope=0.5, centre=2.4, low=0.5, high=1.5),
    top_p=top_p(p=0.9),
)  # fmt: skip
E3 = e3_temperature(vocab_size=16, target=1.0)


def _first_token(tokens, mask, fields):
    """The first token of the response."""
    del fields
    return jnp.max(jnp.where(mask & ~jnp.roll(mask, 1, axis=1), tokens, -1), axis=1)


def sampled(mesh: Mesh, params: Any, sampler: Any = None, required: frozenset[str] = frozenset()) -> Rollouts:
    """What is drawn on a mesh."""
    rng = np.random.default_rng(0)
    prompts = (
        rng.integers(2, 16, (PROMPTS, PROMPT_COLUMNS), np.int32),
        rng.integers(1, PROMPT_COLUMNS + 1, PROMPTS, np.int32),
        {"threshold": rng.integers(6, 11, PROMPTS, np.int32)},
    )
    prompts = jax.device_put(prompts, row_sharding(mesh))
    params = jax.device_put(params, param_shardings(POLICY, mesh))
    sampler = sampler or plain()
    spec = SAMPLER._replace(sampler=sampler, required=required, answer_id=_first_token)
    return make_rollout(POLICY, spec, mesh)(params, jax.random.key(3), jnp.int32(5), *prompts, sampler.init())[0]


def new_state(objective: Objective, params: Any) -> TrainState:
    """A state whose reference policy is another one than its policy."""
    state = new_stage(params, jnp.int32(2), jax.random.key(1), objective, OPTIMIZER, False)
    return state.replace(frozen={"reference": jax.tree.map(lambda x: x * 0.9, params)})


def stepped(mesh: Mesh, objective: Objective, params: Any, rows: Rollouts, **cuts: int) -> tuple[Any, Any]:
    """Parameters and metrics after a whole step on a mesh."""
    state = new_state(objective, params)
    state = jax.device_put(state, state_shardings(POLICY, mesh, OPTIMIZER, state))
    step = make_train_step(make_spec(POLICY, objective, OPTIMIZER, reference=True, **cuts), PROMPTS, mesh)
    state, metrics = step(state, jax.device_put(rows, row_sharding(mesh)))
    return state.params, metrics


def with_temperatures(mesh: Mesh, params: Any, rows: Rollouts) -> Any:
    """Parameters, metrics and the sampler's state after two steps on rows whose tokens have their own temperatures."""
    objective = Objective(grpo(), chain(clip_range=clip_range()), ratio, token_mean, 0.9)
    state = new_stage(params, jnp.int32(2), jax.random.key(1), objective, OPTIMIZER, False, E3)
    state = jax.device_put(state, state_shardings(POLICY, mesh, OPTIMIZER, state))
    spec = make_spec(POLICY, objective, OPTIMIZER, num_epochs=2, sampler=E3, left_out=1)
    step, metrics = make_train_step(spec, PROMPTS, mesh), {}
    for _ in range(2):
        state, metrics = step(state, jax.device_put(rows, row_sharding(mesh)))
    return state.params, metrics, state.decode_state


def preferred(mesh: Mesh, params: Any, rows: Rollouts, num_microbatches: int) -> tuple[Any, Any]:
    """Parameters and metrics after a step of H-DPO on neighbouring rows, some of which are no pair."""
    row = np.arange(rows.row_id.shape[0], dtype=np.int32)
    rewards = np.where(row < 6, 1, 1 - row % 2).astype(np.float32)[:, None]
    stage = Prefer(
        steps=1, loss=h_dpo(alpha=0.8, beta=0.5), mixture={}, batch_size=len(row) // 2, optimizer=OPTIMIZER,
        num_microbatches=num_microbatches,
    )  # fmt: skip
    state = new_preference_stage(params, jnp.int32(2), jax.random.key(1), stage)
    state = state.replace(frozen={"reference": jax.tree.map(lambda x: x * 0.9, params)})
    state = jax.device_put(state, state_shardings(POLICY, mesh, OPTIMIZER, state))
    pairs = jax.device_put(rows.replace(group=row // 2, rewards=rewards), row_sharding(mesh))
    state, metrics = make_preference_step(preference_spec(stage, POLICY), mesh)(state, pairs)
    return state.params, metrics


def covered_rows(params: Any, rows: Rollouts) -> Rollouts:
    """Rows with two rewards, the first 0 or 1, and a sampler whose log-probabilities differ from the trainer's.

    A row in which the entropies of two tokens are equal but for rounding is left out: a quantile lies between them.
    """
    rng = np.random.default_rng(4)
    rewards = np.stack([np.round(rows.rewards[:, 0]), rng.random(rows.rewards.shape[0], np.float32)], axis=1)
    noise = rng.normal(scale=0.2, size=rows.logp_sampler.shape).astype(np.float32)
    scores = jax.jit(make_scorer(POLICY, (LOG_PROB, ENTROPY), 0.9))(params, {}, rows)
    entropy = np.sort(np.where(rows.loss_mask, scores["entropy"], np.arange(100, 100 + noise.shape[1])), axis=1)
    mask = rows.loss_mask & (np.diff(entropy, axis=1).min(axis=1, keepdims=True) > 1e-5)
    assert mask.any(axis=1).mean() > 0.9
    return rows.replace(rewards=rewards, logp_sampler=np.where(mask, rows.logp_sampler + noise, 0.0), loss_mask=mask)


# The same step written for one device's rows, as someone with a mapped loop of their own would.


def _gather(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.lax.all_gather(x, "rows", tiled=True), tree)


def _own(tree: Any, num: int) -> Any:
    start = jax.lax.axis_index("rows") * num
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, num), tree)


def mapped_step(spec: StepSpec, state: TrainState, rows: Rollouts) -> Any:
    """Parameters after a step, from the rows of one device: plans are made of all, gradients summed over devices."""
    num, rows = rows.row_id.shape[0], select_valid(rows)
    reference = make_scorer(POLICY, (LOG_PROB,), spec.temperature)(state.frozen["reference"], {}, rows)
    rows = rows.replace(
        logp_old=spec.scorer(state.params, state.frozen, rows)["log_prob"],
        token_data={**rows.token_data, "ref_log_prob": reference["log_prob"]},
    )
    batch = _gather(rows)
    advantage, _, _, _ = spec.estimate(batch, state.estimator_state)
    key = jax.random.fold_in(jax.random.fold_in(state.key, UPDATES), state.step)
    plan_key = jax.random.split(key)[1]

    def update(carry: tuple[Any, Any, Any], index: jax.Array) -> tuple[tuple[Any, Any, Any], None]:
        params, opt_state, mechanism_state = carry
        q, pull = jax.vjp(lambda p: spec.scorer(p, state.frozen, rows), params)
        signals = Signals(batch=batch, scores=_gather(q), step=state.step, update_index=index)
        update_key = jax.random.fold_in(plan_key, index)
        plan, weight, mechanism_state = plan_update(spec, mechanism_state, signals, advantage, update_key)
        plan, weight = _own((plan.replace(metrics={}), weight), num)
        cotangent, _ = jax.grad(functools.partial(loss, spec), has_aux=True)(q, plan, weight, rows, index == 0)
        gradient = jax.lax.psum(pull(cotangent)[0], "rows")
        return (*apply_optimizer(spec.optimizer, gradient, opt_state, params), mechanism_state), None

    start = state.params, state.opt_state, state.mechanism_state
    return jax.lax.scan(update, start, jnp.arange(spec.num_epochs, dtype=jnp.int32))[0][0]


def by_pmap(spec: StepSpec, state: TrainState, rows: Rollouts) -> Any:
    """Under `jax.pmap`, the parameters of the first device."""
    split = jax.tree.map(lambda x: x.reshape((8, -1, *x.shape[1:])), rows)
    step = jax.pmap(functools.partial(mapped_step, spec), axis_name="rows", in_axes=(None, 0))
    return jax.tree.map(lambda x: x[0], step(state, split))


def by_shard_map(spec: StepSpec, state: TrainState, rows: Rollouts) -> Any:
    """Under `jax.shard_map`; the fused head's custom rule needs `check_vma=False`."""
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
    step = jax.shard_map(
        functools.partial(mapped_step, spec), mesh=mesh, in_specs=(P(), P("rows")), out_specs=P(), check_vma=False
    )
    return jax.jit(step)(state, rows)


def chains_on_layouts(keep: Callable[[str, str, Any], None], meshes: Mapping[str, Mesh], names: Sequence[str]) -> None:
    """Two updates of each chain of `covering` that is named: at once on one device, in two micro-batches on eight."""
    params = jax.device_get(jax.jit(POLICY.init)(jax.random.key(0)))
    rows = covered_rows(params, jax.device_get(sampled(meshes["1x1x1"], params, required=ON_DEMAND)))
    for (case, objective), layout in zip(covering.chains().items(), itertools.cycle(["2x2x2", "8x1x1", "1x2x4"])):
        if case in names:
            keep(case, "1x1x1", stepped(meshes["1x1x1"], objective, params, rows, num_epochs=2))
            keep(case, "other", stepped(meshes[layout], objective, params, rows, num_epochs=2, num_microbatches=2))


def representatives(keep: Callable[[str, str, Any], None], meshes: Mapping[str, Mesh]) -> None:
    """Samples, and steps of some chains on all layouts."""
    params = jax.device_get(jax.jit(POLICY.init)(jax.random.key(0)))
    rows = jax.device_get(sampled(meshes["1x1x1"], params))
    for layout, mesh in meshes.items():
        keep("sample", layout, sampled(mesh, params))
        for case, objective in METHODS.items():
            after = stepped(mesh, objective, params, rows, num_minibatches=2, num_epochs=2)
            keep(case, layout, after)
        keep("is_whole", layout, jax.tree.map(lambda x: x.sharding.is_fully_replicated, after[0]))
    objective = method(**ALL, estimator=rloo(), normaliser=sequence_mean_token_mean)
    decoded = jax.device_get(sampled(meshes["1x1x1"], params, DECODING, ON_DEMAND))
    for layout in ("1x1x1", "2x2x2"):
        keep("decoding", layout, sampled(meshes[layout], params, DECODING, ON_DEMAND))
        keep("temperatures", layout, with_temperatures(meshes[layout], params, decoded))
        cuts = {"num_epochs": 2, "num_microbatches": 2, "ledger": Ledger(first_order_every=1)}
        keep("rloo", layout, stepped(meshes[layout], objective, params, rows, **cuts))
        keep("h_dpo", layout, preferred(meshes[layout], params, rows, 1 if layout == "1x1x1" else 2))
    spec = make_spec(POLICY, objective, OPTIMIZER, reference=True, num_epochs=2)
    keep("rloo", "pmap", (by_pmap(spec, new_state(objective, params), rows),))
    keep("rloo", "shard_map", (by_shard_map(spec, new_state(objective, params), rows),))


def main(out: str, *names: str) -> None:
    """Runs the chains that are named, or else the representatives, and saves their arrays."""
    assert jax.device_count() == 8, f"{jax.devices()}: eight CPU devices are needed"
    found: dict[str, np.ndarray] = {}

    def keep(case: str, layout: str, tree: Any) -> None:
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            found[f"{case}:{layout}:{jax.tree_util.keystr(path)}"] = np.asarray(leaf)

    meshes = {name: make_mesh(MeshShape(*shape), math.prod(shape)) for name, shape in LAYOUTS.items()}
    chains_on_layouts(keep, meshes, names) if names else representatives(keep, meshes)
    np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
