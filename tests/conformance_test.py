"""What every method must keep, whatever it computes: one list of all of them, one line per method.

Each method runs inside the real plan and loss (`train.step`) on a stored batch: jit is eager, the number of
micro-batches, padding and the order of rows change nothing, masked content (NaN included) has no influence, the state
keeps its structure, gradients are finite, dtypes are kept, neutral settings do nothing, settings share a compilation.
"""

import ast
import dataclasses
import functools
import importlib
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jentropy
from jentropy import normalisers, surrogates
from jentropy.advantages.fr3e import fr3e
from jentropy.advantages.gae import gae
from jentropy.advantages.gdpo import gdpo
from jentropy.advantages.grpo import grpo
from jentropy.advantages.opo import opo
from jentropy.advantages.prime import prime
from jentropy.advantages.qae import qae
from jentropy.advantages.raft import raft, reinforce_rej
from jentropy.advantages.reinforce import reinforce
from jentropy.advantages.reinforce_pp import reinforce_pp, reinforce_pp_baseline
from jentropy.advantages.remax import remax
from jentropy.advantages.rloo import rloo
from jentropy.advantages.s_grpo import s_grpo
from jentropy.advantages.vine import vine
from jentropy.base import Estimator, Mechanism, Rollouts, Signals
from jentropy.compose import chain
from jentropy.mechanisms.adaptive_entropy import adaptive_entropy
from jentropy.mechanisms.ce_gppo import ce_gppo
from jentropy.mechanisms.clip_cov import clip_cov
from jentropy.mechanisms.clip_range import clip_range
from jentropy.mechanisms.entropy_advantage import entropy_advantage
from jentropy.mechanisms.entropy_band import entropy_band
from jentropy.mechanisms.entropy_bonus import entropy_bonus
from jentropy.mechanisms.importance_correction import importance_correction, rejection
from jentropy.mechanisms.kl_cov import kl_cov
from jentropy.mechanisms.kl_reference import kl_reference
from jentropy.mechanisms.semantic_entropy import semantic_entropy
from jentropy.mechanisms.siren import siren
from jentropy.mechanisms.steer import steer
from jentropy.mechanisms.top_entropy import top_entropy
from jentropy.train.optimizer import AdamW
from jentropy.train.scoring import from_micro, to_micro
from jentropy.train.step import StepSpec, loss, plan_update


@dataclasses.dataclass(frozen=True)
class Case:
    """A line of the list.

    Attributes:
      factory: makes the method from `settings`; a surrogate or normaliser without settings is itself the method.
      settings: under which it does something on the stored batch; numbers differ from the defaults.
      neutral: further settings under which a mechanism is the identity and a surrogate is `ratio`.
      other: settings that differ from `settings` in numbers only; by default its numbers are left out.
    """

    factory: Callable[..., Any]
    settings: Mapping[str, Any] | None = None
    neutral: Mapping[str, Any] | None = None
    other: Mapping[str, Any] | None = None

    def make(self, **changes: Any) -> Any:
        return self.factory if self.settings is None else self.factory(**{**self.settings, **changes})

    def make_other(self) -> Any:
        options = {k: v for k, v in (self.settings or {}).items() if isinstance(v, str | bool) or callable(v)}
        return self.factory(**(options if self.other is None else self.other))


INF = float("inf")

METHODS: dict[str, Case] = {
    # Advantage estimators.
    "fr3e": Case(fr3e, {"reward_weights": (1.0, 0.3)}),
    "fr3e/released": Case(fr3e, {"value": "positive_fraction", "v0": "complement", "sharpen": 1.5},
                          other={"value": "positive_fraction", "v0": "complement", "sharpen": 2.0, "epsilon": 1e-3}),
    "fr3e/group": Case(fr3e, {"v0": "own", "scale_rewards": "group", "epsilon": 1e-4}),
    "gae": Case(gae, {"gamma": 0.9, "lam": 0.8, "reward_weights": (1.0, 0.3)}),
    "gae/raw": Case(gae, {"whiten": False, "bootstrap": True, "lam": 0.8}),
    "gae/kl": Case(gae, {"kl_coef": 0.1, "kl_target": 0.1, "lam": 0.8}, other={"kl_coef": 1.0, "kl_target": 1.0}),
    "gdpo": Case(gdpo, {"epsilon": 1e-3, "reward_weights": (1.0, 0.3)}),
    "gdpo/token": Case(gdpo, {"final_norm": "token", "reward_weights": (1.0, 0.3)}),
    "gdpo/none": Case(gdpo, {"final_norm": "none", "reward_weights": (1.0, 0.3)}),
    "grpo": Case(grpo, {"epsilon": 1e-4, "reward_weights": (1.0, 0.3)}),
    "grpo/batch": Case(grpo, {"scale_rewards": "batch", "epsilon": 1e-4}),
    "grpo/none": Case(grpo, {"scale_rewards": "none", "reward_weights": (1.0, 0.3)}),
    "grpo/raw": Case(grpo, {"singleton": "raw", "epsilon": 1e-4}),
    "prime": Case(prime, {"process_weight": 0.5, "outcome_gamma": 0.9, "reward_weights": (1.0, 0.3)}),
    "prime/code": Case(prime, {"baseline": "code", "normalise": "none", "beta": 0.3, "process_gamma": 0.9}),
    "prime/whole": Case(prime, {"granularity": "whole", "whiten": False, "reward_weights": (1.0, 0.3)}),
    "qae": Case(qae, {"quantile_k": 0.3, "reward_weights": (1.0, 0.3)}),
    "qae/linear": Case(qae, {"baseline": "linear", "scale_rewards": "group", "epsilon": 1e-4}),
    "qae/lower": Case(qae, {"baseline": "lower", "quantile_k": 0.7}),
    "reinforce": Case(reinforce, {"reward_weights": (1.0, 0.3)}),
    "reinforce/batch_mean": Case(reinforce, {"baseline": "batch_mean", "reward_weights": (1.0, 0.3)}),
    "rloo": Case(rloo, {"reward_weights": (1.0, 0.3)}),
    "rloo/raw": Case(rloo, {"singleton": "raw", "reward_weights": (1.0, 0.3)}),
    "rloo/kl": Case(rloo, {"kl_coef": 0.1, "reward_weights": (1.0, 0.3)}, other={"kl_coef": 1.0}),
    "opo": Case(opo, {"reward_weights": (1.0, 0.3)}),
    "opo/raw": Case(opo, {"singleton": "raw", "reward_weights": (1.0, 0.3)}),
    "raft": Case(raft, {"reward_weights": (1.0, 0.0)}),
    "raft/binary": Case(raft, {"rewards": "binary", "reward_weights": (1.0, 0.0)}),
    "reinforce_rej": Case(reinforce_rej, {"rewards": "binary", "reward_weights": (1.0, 0.0)}),
    "reinforce_rej/raw": Case(reinforce_rej, {"singleton": "raw", "reward_weights": (1.0, 0.0)}),
    "reinforce_pp": Case(reinforce_pp, {"gamma": 0.9, "reward_weights": (1.0, 0.3)}),
    "reinforce_pp/kl": Case(reinforce_pp, {"kl_coef": 0.1, "reward_weights": (1.0, 0.3)}, other={"kl_coef": 1.0}),
    "reinforce_pp/sequence": Case(reinforce_pp, {"whiten_unit": "sequence", "reward_weights": (1.0, 0.3)}),
    "reinforce_pp_baseline": Case(reinforce_pp_baseline, {"reward_weights": (1.0, 0.3)}),
    "reinforce_pp_baseline/drop": Case(
        reinforce_pp_baseline, {"whiten_unit": "sequence", "drop_degenerate": True, "reward_weights": (1.0, 0.3)}
    ),
    "reinforce_pp_baseline/raw": Case(reinforce_pp_baseline, {"singleton": "raw", "reward_weights": (1.0, 0.3)}),
    "remax": Case(remax, {}),
    "s_grpo": Case(s_grpo, {"decay": 0.7, "reward_weights": (1.0, 0.0)}),
    "vine": Case(vine, {"reward_weights": (1.0, 0.3)}),
    "vine/raw": Case(vine, {"whiten": False, "reward_weights": (1.0, 0.3)}),
    # Mechanisms.
    "adaptive_entropy": Case(adaptive_entropy, {"entropy_coef_init": 0.1, "entropy_coef_max": 0.2},
                             {"entropy_coef_init": 0.0, "entropy_coef_max": 0.0}),
    "adaptive_entropy/trl": Case(adaptive_entropy, {"rule": "trl", "entropy_estimate": "sampled",
                                 "entropy_target": "first_batch", "target_fraction": 0.5}),
    "ce_gppo": Case(ce_gppo, {"beta1": 0.5, "beta2": 0.8}, {"beta1": 0.0, "beta2": 0.0}),
    "clip_cov": Case(clip_cov, {"clip_cov_ratio": 0.1, "clip_cov_lb": 0.1, "clip_cov_ub": 9.0}, {"clip_cov_ratio": 0}),
    "clip_range": Case(clip_range, {"epsilon_low": 0.3, "epsilon_high": 0.5}, {"epsilon_low": 1, "epsilon_high": INF}),
    "entropy_advantage": Case(entropy_advantage, {"entropy_adv_alpha": 0.2, "entropy_adv_kappa": 3.0},
                              {"entropy_adv_alpha": 0.0}),
    "entropy_band": Case(entropy_band, {"entropy_low": 2, "entropy_high": 3, "entropy_coef_delta": 0.1,
                         "entropy_coef_max": 0.2}, {"entropy_coef_max": 0.0}),
    "entropy_bonus": Case(entropy_bonus, {"entropy_coef": 0.1}, {"entropy_coef": 0.0}),
    "entropy_bonus/schedule": Case(entropy_bonus, {"entropy_coef": lambda k: jnp.where(k == 3, 0.1, 0.0)}),
    "importance_correction": Case(importance_correction, {"rollout_is_threshold": 1.3, "lower": 0.6},
                                  {"rollout_is_threshold": 1.0, "lower": 1.0}),
    "importance_correction/mask": Case(importance_correction, {"level": "sequence_mean", "mode": "mask", "lower": 0.8,
                                       "rollout_is_threshold": 1.5, "batch_normalise": True}),
    "importance_correction/sequence": Case(importance_correction, {"level": "sequence", "rollout_is_threshold": 1.5}),
    "rejection": Case(rejection, {"level": "token", "lower": 0.7, "upper": 1.4}, {"lower": 0.0, "upper": INF}),
    "rejection/k3": Case(rejection, {"level": "sequence_max", "statistic": "k3", "upper": 0.2, "denominator": "all"},
                         {"upper": INF}),
    "kl_cov": Case(kl_cov, {"kl_cov_ratio": 0.1, "ppo_kl_coef": 0.5}, {"kl_cov_ratio": 0.0}),
    "kl_cov/k3": Case(kl_cov, {"kl_cov_ratio": 0.1, "estimator": "k3", "keep_clip": True}, {"ppo_kl_coef": 0.0}),
    "kl_reference/k1": Case(kl_reference, {"beta": 0.1, "estimator": "k1"}, {"beta": 0.0}),
    "kl_reference/k2": Case(kl_reference, {"beta": 0.1, "estimator": "k2"}, {"beta": 0.0}),
    "kl_reference/k3": Case(kl_reference, {"beta": 0.1, "estimator": "k3"}, {"beta": 0.0}),
    "kl_reference/k3+": Case(kl_reference, {"beta": 0.1, "estimator": "k3+"}, {"beta": 0.0}),
    "kl_reference/full": Case(kl_reference, {"beta": 0.1, "estimator": "full"}, {"beta": 0.0}),
    "semantic_entropy": Case(semantic_entropy, {"semantic_entropy_alpha": 0.7}, {"semantic_entropy_alpha": 0.0}),
    "semantic_entropy/shannon": Case(semantic_entropy, {"estimator": "shannon", "form": "exponential",
                                     "unparsed": "shared"}, {"semantic_entropy_alpha": 0.0}),
    "semantic_entropy/mc": Case(semantic_entropy, {"estimator": "mc", "form": "focal", "length_normalised": True},
                                {"semantic_entropy_alpha": 0.0}),
    "siren": Case(siren, {"tau": 0.5, "beta": 0.3, "target": 0.5}, {"beta": 0.0}),
    "siren/anchor": Case(siren, {"tau": 0.5, "beta": 0.3}),
    "siren/released": Case(siren, {"tau": 0.5, "beta": 0.3, "target": 0.5, "nucleus": "released", "strict": True,
                           "average": "rows"}, {"beta": 0.0}),
    "steer": Case(steer, {"weight_min": 0.5, "weight_max": 1.5}, {"weight_min": 1.0, "weight_max": 1.0}),
    "steer/exponential": Case(steer, {"weight_min": 0.5, "weight_max": 1.5, "mapping": "exponential",
                              "mode": "asymmetric"}, {"weight_min": 1.0}),
    "top_entropy": Case(top_entropy, {"top_entropy_quantile": 0.3}, {"top_entropy_quantile": 1.0}),
    "top_entropy/quantile": Case(top_entropy, {"rule": "quantile", "denominator": "selected"},
                                 {"top_entropy_quantile": 1.0}),
    "top_entropy/sequence": Case(top_entropy, {"scope": "sequence", "denominator": "selected"},
                                 {"top_entropy_quantile": 1.0}),
    "top_entropy/sequence_quantile": Case(top_entropy, {"scope": "sequence", "rule": "quantile"},
                                          {"top_entropy_quantile": 1.0}),
    # Surrogates.
    "ratio": Case(surrogates.ratio),
    "dual_clip": Case(surrogates.dual_clip, {"clip_ratio_c": 1.5}, {"clip_ratio_c": 1e9}),
    "surrogates.reinforce": Case(surrogates.reinforce),
    "gspo": Case(surrogates.gspo, {"form": "sequence"}),
    "gspo/token": Case(surrogates.gspo, {"form": "token"}),
    "sequence_ratio": Case(surrogates.sequence_ratio),
    "cispo": Case(surrogates.cispo, {"cap": None}),
    "cispo/cap": Case(surrogates.cispo, {"cap": 1.5}),
    # Normalisers.
    "token_mean": Case(normalisers.token_mean),
    "sequence_mean_token_mean": Case(normalisers.sequence_mean_token_mean),
    "sequence_mean_token_sum": Case(normalisers.sequence_mean_token_sum),
    "token_sum": Case(normalisers.token_sum),
    "fixed_length": Case(normalisers.fixed_length, {"length": 7}),
}  # fmt: skip

SCORES = (
    *("log_prob", "entropy", "log_normaliser", "reference_kl", "reference_forward_kl"),
    *("nucleus_entropy(0.8)", "nucleus_entropy_released(0.8)"),
)
ROWS, COLUMNS = 16, 10
MICRO = (1, 2, 4, 16)


# Every public factory is in the list.


def _public_functions(module: str) -> list[ast.FunctionDef]:
    tree = ast.parse(pathlib.Path(jentropy.__file__).parent.joinpath(*module.split(".")).with_suffix(".py").read_text())
    return [node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]


def _factories() -> dict[str, list[Any]]:
    """Of each module of methods, what makes methods: in the packages the functions that return one, by annotation."""
    root, found = pathlib.Path(jentropy.__file__).parent, {}
    for package, returns in (("advantages", "Estimator"), ("mechanisms", "Mechanism")):
        for path in sorted((root / package).glob("*.py")):
            if path.stem != "__init__":
                module = f"{package}.{path.stem}"
                functions = [f for f in _public_functions(module) if f.returns and ast.unparse(f.returns) == returns]
                found[module] = [f.name for f in functions]
    found |= {module: [f.name for f in _public_functions(module)] for module in ("surrogates", "normalisers")}
    return {
        module: [getattr(importlib.import_module(f"jentropy.{module}"), name) for name in names]
        for module, names in found.items()
    }


@pytest.mark.parametrize("module", sorted(_factories()))
def test_every_method_is_in_the_list(module):
    factories = _factories()[module]
    assert factories, f"{module} has no public function that returns a method"
    for factory in factories:
        assert any(case.factory is factory for case in METHODS.values()), f"{module}.{factory.__name__} is not listed"


# The stored batch.


class Example(NamedTuple):
    """A batch and its scores."""

    rollouts: Rollouts
    scores: Mapping[str, Any]


def _mask(rng: np.random.Generator) -> np.ndarray:
    """`[16, 10]`: a prompt of 1 to 3 tokens, a response of 1 to 7; row 5 has none, row 9 one in the last column."""
    column, start = np.arange(COLUMNS)[None, :], rng.integers(1, 4, ROWS)[:, None]
    mask = (column >= start) & (column < start + rng.integers(1, 8, ROWS)[:, None])
    mask[5], mask[9] = False, column[0] == COLUMNS - 1
    return mask


def _steps() -> dict[str, jax.Array]:
    """Steps of three columns, the last of each without an id, and values of which a third are not known."""
    column, state = np.arange(COLUMNS), np.arange(ROWS * 5).reshape(ROWS, 5)
    step = np.where(column % 3 == 2, -1, column // 3)
    return {
        "step_id": jnp.asarray(np.broadcast_to(step, (ROWS, COLUMNS)), jnp.int32),
        "prefix_value": jnp.asarray(state * 7 % 9 / 4, jnp.float32),
        "prefix_known": jnp.asarray(state % 3 != 0),
    }


@functools.cache
def example() -> Example:
    """Ragged rows, an empty one, an invalid one with NaN as reward, ties, groups of 1 to 5 rows, one of equal rewards.

    Two groups were forked from a row of a third. Log-probabilities and advantages are multiples of 1/4, so covariances
    tie. Outside the mask there are zeros.
    """
    rng = np.random.default_rng(7)
    mask, shape = _mask(rng), (ROWS, COLUMNS)
    group = np.array([3, 3, 0, 0, 0, 3, 1, 1, 4, 0, 0, 2, 1, 4, 2, 1])
    rewards = np.stack([rng.integers(0, 2, ROWS), rng.normal(size=ROWS)], axis=1)
    rewards[group == 4] = 0.1
    rewards[14] = np.nan

    def token(values: np.ndarray) -> jax.Array:
        return jnp.asarray(np.where(mask, values, 0.0), jnp.float32)

    log_prob = -rng.integers(0, 9, shape) / 4
    rollouts = Rollouts(
        tokens=jnp.asarray(rng.integers(0, 16, shape), jnp.int32),
        loss_mask=jnp.asarray(mask),
        logp_sampler=token(log_prob + rng.normal(size=shape) / 50),
        logp_old=token(log_prob + rng.integers(-3, 4, shape) / 4),
        rewards=jnp.asarray(rewards, jnp.float32),
        row_id=jnp.asarray(rng.permutation(40)[:ROWS], jnp.int32),
        group=jnp.asarray(group, jnp.int32),
        parent=jnp.full(ROWS, -1, jnp.int32),
        fork=jnp.asarray(np.argmax(mask, axis=1), jnp.int32),
        token_data={
            "ref_log_prob": token(log_prob + rng.normal(size=shape)),
            "advantage": token(rng.integers(-6, 7, shape) / 4),
            "value": token(np.cos(np.arange(mask.size)).reshape(shape)),
            "implicit_reward": token(np.sin(np.arange(mask.size)).reshape(shape)),
        },
        row_data={
            "is_valid": jnp.asarray(np.arange(ROWS) != 14),
            "truncated": jnp.asarray(rng.random(ROWS) < 0.3),
            "answer_id": jnp.asarray(np.arange(ROWS) * 5 % 3 - 1, jnp.int32),
            "greedy_reward": jnp.asarray(group / 4 - 0.5, jnp.float32),
            "exit_order": jnp.asarray(np.arange(ROWS) * 7 % 5, jnp.int32),
            **_steps(),
            "bootstrap_value": jnp.asarray(np.sin(np.arange(ROWS)), jnp.float32),
        },
    )
    parent = jnp.where(np.isin(group, (1, 3)), rollouts.row_id[2], -1)  # of the prompt of group 0, at columns 6 and 4
    fork = jnp.where(parent < 0, rollouts.fork, jnp.where(group == 1, 6, 4))
    rollouts = rollouts.replace(parent=parent, fork=fork)
    positive = {name: token(rng.exponential(size=shape)) for name in SCORES[1:]}
    return Example(rollouts, {"log_prob": token(log_prob), **positive})


def _tokenwise(function: Callable[[jax.Array], jax.Array], x: Example) -> Example:
    """The example with `function` applied to every `[B, T]` float."""
    rollouts = x.rollouts.replace(
        logp_sampler=function(x.rollouts.logp_sampler),
        logp_old=function(x.rollouts.logp_old),
        token_data={k: function(v) for k, v in x.rollouts.token_data.items()},
    )
    return Example(rollouts, {k: function(v) for k, v in x.scores.items()})


def _with_garbage(x: Example) -> Example:
    """The example with NaN, infinities and huge numbers outside the mask, and other tokens there."""
    mask = np.asarray(x.rollouts.loss_mask)
    rng = np.random.default_rng(1)

    def spoil(values: jax.Array) -> jax.Array:
        garbage = rng.choice([np.nan, np.inf, -np.inf, 1e30, -1e30], mask.shape)
        return jnp.where(mask, values, garbage.astype(values.dtype))

    x = _tokenwise(spoil, x)
    tokens = jnp.where(mask, x.rollouts.tokens, rng.integers(0, 16, mask.shape).astype(np.int32))
    return x._replace(rollouts=x.rollouts.replace(tokens=tokens))


def _padded(x: Example, rows: int, columns: int) -> Example:
    """The example with masked rows (not valid, of a group that exists, reward NaN) and masked columns, all garbage."""

    def pad(values: jax.Array, fill: Any) -> jax.Array:
        width = ((0, rows), (0, columns)) if values.ndim == 2 else ((0, rows),)
        return jnp.pad(values, width, constant_values=fill)

    whole = x.rollouts
    x = _tokenwise(lambda values: pad(values, np.nan), x)
    new_id = jnp.concatenate([whole.row_id, 100 + jnp.arange(rows, dtype=jnp.int32)])
    rollouts = x.rollouts.replace(
        tokens=pad(whole.tokens, 0),
        loss_mask=pad(whole.loss_mask, False),
        rewards=jnp.pad(whole.rewards, ((0, rows), (0, 0)), constant_values=np.nan),
        row_id=new_id,
        group=pad(whole.group, 1),
        parent=pad(whole.parent, -1),
        fork=pad(whole.fork, 0),
        row_data={k: pad(v, False) for k, v in whole.row_data.items()},
    )
    return x._replace(rollouts=rollouts)


# The program: estimate, plan, loss and its gradient with respect to the quantities, in micro-batches.


def _given_advantage(rollouts, state):
    return rollouts.token_data["advantage"], {}, {}, state


GIVEN = Estimator(init=lambda: (), estimate=_given_advantage)


class Parts(NamedTuple):
    """What is compiled, and its states."""

    spec: StepSpec
    states: tuple[Any, Any]


def _parts(estimator=GIVEN, mechanisms=None, surrogate=surrogates.ratio, normaliser=normalisers.token_mean) -> Parts:
    mechanisms = chain(clip_range=clip_range()) if mechanisms is None else mechanisms
    spec = StepSpec(
        policy=None, estimate=estimator.estimate, update=mechanisms.update, outputs=mechanisms.outputs,
        terms=tuple(sorted(mechanisms.terms.items())), surrogate=surrogate, normaliser=normaliser, temperature=1.0,
        optimizer=AdamW(),
    )  # fmt: skip
    return Parts(spec, (estimator.init(), mechanisms.init()))


def _kind(case: Case) -> str:
    method = case.make()
    if isinstance(method, Mechanism):
        return "mechanisms"
    return "estimator" if isinstance(method, Estimator) else _module(case).rstrip("s")


def _module(case: Case) -> str:
    return case.factory.__module__.rpartition(".")[2]


def parts_of(case: Case, method: Any = None) -> Parts:
    """The method among plain others; a mechanism comes after PPO's clip range."""
    method, kind = case.make() if method is None else method, _kind(case)
    return _parts(**{kind: chain(clip_range=clip_range(), method=method) if kind == "mechanisms" else method})


class Planned(NamedTuple):
    """What a method makes of a batch before the loss; `metrics` as `(sum, count)`."""

    advantage: Any
    plan: Any
    weight: Any
    metrics: Any
    states: tuple[Any, Any]
    rows: Rollouts


class Loss(NamedTuple):
    """The loss of the batch, its gradient with respect to each quantity `[B, T]`, its metrics."""

    value: Any
    gradient: dict[str, Any]
    metrics: Any


def run_plan(spec: StepSpec, states: tuple[Any, Any], x: Example) -> Planned:
    """Estimator, mechanisms and normaliser on given scores."""
    advantage, token_data, metrics, estimator_state = spec.estimate(x.rollouts, states[0])
    rows = x.rollouts.replace(token_data={**x.rollouts.token_data, **token_data})
    signals = Signals(batch=rows, scores=x.scores, step=jnp.int32(3), update_index=jnp.int32(0))
    plan, weight, state = plan_update(spec, states[1], signals, advantage, jax.random.key(11))
    metrics = {**metrics, **plan.metrics}
    return Planned(advantage, plan.replace(metrics={}), weight, metrics, (estimator_state, state), rows)


def run_loss(spec: StepSpec, scores: Mapping[str, Any], planned: Planned, num: int = 1) -> Loss:
    """The sum over `num` micro-batches."""

    def one(piece: Any) -> Any:
        q, *rest = piece
        return jax.value_and_grad(lambda q: loss(spec, q, *rest, jnp.bool_(False)), has_aux=True)(q)

    pieces = to_micro((dict(scores), planned.plan, planned.weight, planned.rows), num)
    (value, metrics), gradient = jax.vmap(one)(pieces)
    value, metrics = jax.tree.map(lambda y: jnp.sum(y, axis=0), (value, metrics))
    return Loss(value, from_micro(gradient), metrics)


_jitted_plan = jax.jit(run_plan, static_argnames="spec")
_jitted_loss = jax.jit(run_loss, static_argnames=("spec", "num"))


def eager(parts: Parts, x: Example) -> tuple[Planned, Loss]:
    planned = run_plan(parts.spec, parts.states, x)
    return planned, run_loss(parts.spec, x.scores, planned)


def jitted(parts: Parts, x: Example, num: int = 1) -> tuple[Planned, Loss]:
    """The same in `num` micro-batches, compiled; the loss once for all of one surrogate and one set of terms."""
    planned = _jitted_plan(parts.spec, parts.states, x)
    shared = parts.spec._replace(estimate=None, update=None, outputs=(), normaliser=None)
    loss = _jitted_loss(shared, x.scores, planned._replace(advantage=None, metrics=None, states=None), num)
    return jax.tree.map(np.asarray, (planned, loss))


@functools.cache
def baseline(name: str) -> tuple[Planned, Loss]:
    """The result of a method on the stored batch, compiled."""
    return jitted(parts_of(METHODS[name]), example())


def _assert_same(found: Any, wanted: Any, *, exact: bool = False) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted)):
        x, y, where = np.asarray(x), np.asarray(y), jax.tree_util.keystr(path)
        if exact or not np.issubdtype(x.dtype, np.floating):
            np.testing.assert_array_equal(x, y, err_msg=where, strict=True)
        else:
            np.testing.assert_allclose(x, y, rtol=2e-6, atol=2e-7, err_msg=where)


def _rowwise(result: tuple[Planned, Loss]) -> Any:
    """The `[B, T]` arrays of a result."""
    planned, loss = result
    return planned.advantage, planned.plan, planned.weight, loss.gradient


def _at_tokens(result: tuple[Planned, Loss], mask: np.ndarray) -> Any:
    """The `[B, T]` arrays on the mask, `[N]` each."""
    return jax.tree.map(lambda values: np.asarray(values)[mask], _rowwise(result))


def _totals(result: tuple[Planned, Loss]) -> Any:
    """Loss, states, and metrics as their means and counts."""
    planned, loss = result
    metrics = {**planned.metrics, **loss.metrics}
    return loss.value, planned.states, {k: (s / np.maximum(n, 1), n) for k, (s, n) in metrics.items()}


every_method = pytest.mark.parametrize("name", list(METHODS))
MASK = np.asarray(example().rollouts.loss_mask)


@every_method
def test_jit_is_eager(name):
    found, wanted = eager(parts_of(METHODS[name]), example()), baseline(name)
    _assert_same(_at_tokens(found, MASK), _at_tokens(wanted, MASK))
    _assert_same(_totals(found), _totals(wanted))


@every_method
def test_micro_batches_change_nothing(name):
    planned, wanted = baseline(name)
    for num in MICRO[1:]:
        found = run_loss(parts_of(METHODS[name]).spec, example().scores, planned, num)
        _assert_same(found.gradient, wanted.gradient)
        _assert_same(_totals((planned, found)), _totals((planned, wanted)))


@every_method
def test_padding_changes_nothing(name):
    padded, wanted = _padded(example(), 16, 3), baseline(name)
    found = eager(parts_of(METHODS[name]), padded)
    _assert_same(_at_tokens(found, np.asarray(padded.rollouts.loss_mask)), _at_tokens(wanted, MASK))
    _assert_same(_totals(found), _totals(wanted))


@every_method
def test_order_of_rows_changes_nothing(name):
    order = np.random.default_rng(2).permutation(ROWS)
    found = jitted(parts_of(METHODS[name]), jax.tree.map(lambda values: values[order], example()))
    wanted = baseline(name)
    _assert_same(_rowwise(found), jax.tree.map(lambda values: values[order], _rowwise(wanted)))
    _assert_same(_totals(found), _totals(wanted))


@every_method
def test_masked_content_has_no_influence(name):
    found, wanted = jitted(parts_of(METHODS[name]), _with_garbage(example())), baseline(name)
    _assert_same(_at_tokens(found, MASK), _at_tokens(wanted, MASK), exact=True)
    _assert_same(_totals(found), _totals(wanted), exact=True)
    for values in jax.tree.leaves((found[0].weight, found[1].gradient)):
        assert not np.any(values[~MASK])


@every_method
def test_numbers_are_finite(name):
    planned, loss = baseline(name)
    bounded = planned._replace(plan=planned.plan.replace(ratio_high=np.zeros(())), rows=())
    for path, values in jax.tree_util.tree_leaves_with_path((bounded, loss)):
        assert np.all(np.isfinite(values)), jax.tree_util.keystr(path)
    assert np.any(loss.gradient["log_prob"])


@every_method
def test_state_keeps_its_structure(name):
    parts = parts_of(METHODS[name])
    new = jax.eval_shape(functools.partial(run_plan, parts.spec), parts.states, example()).states
    assert jax.tree.structure(new) == jax.tree.structure(parts.states)
    for before, after in zip(jax.tree.leaves(parts.states), jax.tree.leaves(new)):
        assert (before.shape, before.dtype, before.weak_type) == (after.shape, after.dtype, after.weak_type)


@every_method
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtype_is_kept_under_x64(name, dtype):
    with jax.enable_x64(True):
        parts = parts_of(METHODS[name])
        x = jax.tree.map(lambda y: np.asarray(y, dtype) if jnp.issubdtype(y.dtype, jnp.floating) else y, example())
        planned = jax.eval_shape(functools.partial(run_plan, parts.spec), parts.states, x)
        loss = jax.eval_shape(functools.partial(run_loss, parts.spec), x.scores, planned)
    for path, leaf in jax.tree_util.tree_leaves_with_path((planned._replace(states=()), loss)):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            assert leaf.dtype == dtype and not leaf.weak_type, jax.tree_util.keystr(path)
    assert planned.plan.counted.dtype == bool


@every_method
def test_settings_share_a_compilation(name):
    case = METHODS[name]
    if case.settings is None:
        return
    other = case.make_other() if _kind(case) in ("mechanisms", "estimator") else case.make()
    one, two = parts_of(case).spec, parts_of(case, other).spec
    assert one == two and hash(one) == hash(two)


@pytest.mark.parametrize("name", [name for name, case in METHODS.items() if case.neutral is not None])
def test_neutral_setting_is_the_identity(name):
    case = METHODS[name]
    neutral = case.make(**case.neutral)
    if _kind(case) == "mechanisms":
        found, wanted = (eager(_parts(mechanisms=m), example()) for m in (chain(method=neutral), chain()))
        assert not any(np.any(coefficient) for coefficient in found[0].plan.terms.values())
        found = found[0]._replace(plan=found[0].plan.replace(terms={})), found[1]
    else:
        found, wanted = (eager(parts_of(case, method), example()) for method in (neutral, surrogates.ratio))
    _assert_same(_rowwise(found), _rowwise(wanted), exact=True)
    _assert_same(found[1].value, wanted[1].value, exact=True)
    plain = eager(_parts(mechanisms=chain() if case.factory is clip_range else None), example())
    active = eager(parts_of(case), example())
    differs = zip(jax.tree.leaves(active[1].gradient), jax.tree.leaves(plain[1].gradient))
    assert any(np.any(x != y) for x, y in differs), "the settings of the list do nothing"
