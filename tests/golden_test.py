"""Stored outputs of released code: losses, averages, divergences and group statistics; see `golden_cases`."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from golden_cases import (
    BOTH,
    DOUBLE,
    FLOAT32_SCALAR,
    MODES,
    TOLERANCE,
    Case,
    check_group_rows,
    clip_range_of,
    close,
    estimate,
    make_normaliser,
    make_test,
)
from toy import rollouts, signals, update

from jentropy import compose, features, normalisers, surrogates
from jentropy.advantages.grpo import grpo
from jentropy.advantages.rloo import rloo
from jentropy.base import initial_plan
from jentropy.mechanisms import clip_cov, kl_cov, kl_reference

VANILLA_METRICS = {
    "actor/pg_clipfrac": "pg_clipfrac",
    "actor/pg_clipfrac_lower": "pg_clipfrac_lower",
    "actor/ppo_kl": "ppo_kl",
}


def check_vanilla(golden, precision):
    case = Case(golden, precision)
    plan = case.plan(clip_range_of(case.hp))
    surrogate = surrogates.dual_clip(clip_ratio_c=case.hp["clip_ratio_c"])
    for mode in case.modes():
        value, gradient, metrics = case.evaluate(plan, mode, surrogate=surrogate)
        case.check(value, gradient, f"_{mode}_{precision}")
    for name, stored in VANILLA_METRICS.items():
        case.check_mean(metrics, name, stored, f"_{precision}")


def check_policy_loss(golden, precision, surrogate=None):
    """`base_pl_*`: all modes, an advantage per token, and importance weights in `pg_weight`."""
    case = Case(golden, precision)
    surrogate = surrogate or surrogates.dual_clip(clip_ratio_c=case.hp["clip_ratio_c"])
    plan = case.plan(clip_range_of(case.hp))
    for mode in (m for m in MODES if f"loss__{m}" in golden):
        value, gradient, metrics = case.evaluate(plan, mode, surrogate=surrogate)
        case.check(value, gradient, f"__{mode}")
    for name in VANILLA_METRICS.keys() & metrics.keys():
        case.check_mean(metrics, name, VANILLA_METRICS[name], "")
    weighted = plan.replace(pg_weight=plan.pg_weight * jnp.asarray(golden["rollout_is_weights"]))
    per_token = plan.replace(advantage=jnp.asarray(golden["advantages_tok"]))
    for name, changed in (("isw", weighted), ("advtok", per_token)):
        if f"loss__{name}_token_mean" in golden:
            case.check(*case.evaluate(changed, "token_mean", surrogate=surrogate)[:2], f"__{name}_token_mean")


def check_reinforce(golden, precision):
    check_policy_loss(golden, precision, surrogates.reinforce)


def check_clip_cov(golden, precision):
    """The stored selection is one of our candidate sets, of our size; it is then put in the place of our draw."""
    case = Case(golden, precision)
    hp = {k: case.hp[k] for k in ("clip_cov_ratio", "clip_cov_lb", "clip_cov_ub")}
    mechanism = clip_cov.clip_cov(**hp)
    before, state = case.plan(clip_range_of(case.hp)), mechanism.init()
    candidate = np.asarray(jax.jit(clip_cov.candidates)(before, state, case.signals))
    count = int(clip_cov.num_selected(state, case.signals.batch.loss_mask, jnp.asarray(candidate)))
    selected, order = golden[f"selected_mask_{precision}"] > 0, golden[f"perm_{precision}"]
    assert candidate.sum() == len(order)
    drawn = np.zeros_like(selected)
    drawn[tuple(np.argwhere(candidate)[order[:count]].T)] = True
    np.testing.assert_array_equal(drawn, selected)
    plan = clip_cov.drop(before, jnp.asarray(selected))
    for mode in case.modes():
        case.check(*case.evaluate(plan, mode)[:2], f"_{mode}_{precision}")
    ours = case.plan(compose.chain(clip=clip_range_of(case.hp), cov=mechanism))
    assert (np.asarray(ours.pg_weight) != case.mask).sum() == count
    case.check_mean(ours.metrics, "clip_cov/selected_fraction", "pg_clipfrac", f"_{precision}")


def check_kl_cov(golden, precision):
    """With one advantage everywhere the source penalises tokens picked by rounding noise; here none is."""
    case = Case(golden, precision)
    constant = case.mask.any() and np.ptp(golden["advantages"][case.mask]) == 0
    mechanism = kl_cov.kl_cov(
        kl_cov_ratio=case.hp["kl_cov_ratio"], ppo_kl_coef=case.hp["ppo_kl_coef"], normaliser=normalisers.token_sum
    )
    plan = case.plan(mechanism)
    for mode in case.modes():
        weight = case.normaliser(mode)(plan.counted, case.signals.batch)
        weighted = plan.replace(terms={"abs_log_ratio": plan.terms["abs_log_ratio"] * weight})
        value, gradient, metrics = case.evaluate(weighted, mode, terms=mechanism.terms)
        if constant:
            bare, bare_gradient, _ = case.evaluate(plan.replace(terms={}), mode)
            assert not np.any(plan.terms["abs_log_ratio"])
            assert value == bare < golden[f"loss_{mode}_{precision}"]
            np.testing.assert_array_equal(gradient, bare_gradient)
        else:
            case.check(value, gradient, f"_{mode}_{precision}")
    assert metrics["actor/pg_clipfrac"][0] == 0.0


def check_authors_losses(golden, precision):
    """The authors' own repository: `k_percent` is in percent, means divide by `N + 1e-8`, there is no dual clip.

    The file does not hold its clip range: it is that of their recipes, 0.2 and 0.28.
    """
    case = Case({"hp_clip_ratio_high": np.float64(0.28), **golden}, precision)
    num_tokens = case.mask.sum()
    scale = num_tokens / (num_tokens + 1e-8)
    losses = {k: v for k, v in golden.items() if k.endswith(f"_loss_{precision}")}
    for key, expected in losses.items():
        name = key.removesuffix(f"_loss_{precision}")
        mechanism = clip_range_of(case.hp)
        if percent := re.fullmatch(r"klcov_kpercent([\d.]+)", name):
            mechanism = kl_cov.kl_cov(kl_cov_ratio=float(percent[1]) / 100.0, ppo_kl_coef=case.hp["ppo_kl_coef"])
        else:
            assert name == "vanilla"
        value, gradient, _ = case.evaluate(case.plan(mechanism), "token_mean", terms=mechanism.terms)
        close(value * scale, expected, TOLERANCE[precision])
        close(gradient * scale, golden[f"{name}_grad_{precision}"], TOLERANCE[precision])


def weights(mask, mode, length, dtype=np.float64):
    return make_normaliser(mode, length)(jnp.asarray(mask), rollouts(mask, logp_old=np.zeros(mask.shape, dtype)))


def whole_batch(mask, num_tokens, num_rows):
    """The mask `[b, T]` as the first rows of a batch with these totals: what a micro-batch is part of."""
    more_rows = num_rows - int(mask.any(axis=1).sum())
    more_tokens = num_tokens - int(mask.sum())
    lengths = np.full(more_rows, more_tokens // more_rows)
    lengths[0] += more_tokens - lengths.sum()
    width = max(mask.shape[1], lengths.max())
    rest = np.arange(width)[None, :] < lengths[:, None]
    return np.concatenate([np.pad(mask, ((0, 0), (0, width - mask.shape[1]))), rest])


def check_aggregation(golden, precision):
    """`base_agg_*`. NaN in the padding of the loss leaks into the source's sequence means, not into ours."""
    mask, tolerance = golden["loss_mask"] > 0, TOLERANCE[precision]
    values, width = np.where(mask, golden["loss_mat"], 0.0), mask.shape[1]
    for key in (k for k in golden if k.startswith("loss__")):
        mode, suffix = re.fullmatch(r"loss__(.*?)(_global|_fixed)?", key).groups()
        length = int(golden["loss_scale_factor_fixed"]) if suffix == "_fixed" else width
        weight, scale = np.asarray(weights(mask, mode, length)), 1.0
        if suffix == "_global":
            batch = whole_batch(mask, int(golden["batch_num_tokens_global"]), int(golden["global_batch_size_global"]))
            weight = np.asarray(weights(batch, mode, length))[: len(mask), :width]
            scale = float(golden["dp_size_global"])
        if np.isnan(golden[key]):
            assert mode.startswith("seq") and np.isnan(golden["loss_mat"][~mask]).any()
            assert np.isfinite(weight).all()
            continue
        close((weight * values).sum() * scale, golden[key], tolerance)
        if f"grad__{mode}{suffix or ''}" in golden:
            close(weight * scale, golden[f"grad__{mode}{suffix or ''}"], tolerance)


def check_aggregation_in_two_sources(golden, precision):
    """`entropy_agg_loss_*`: verl; verl as a micro-batch of 97 tokens and 13 rows on 4 ranks; the authors' code.

    The authors' means divide by `N + 1e-8`, its rows' means count empty rows too (NaN for an empty row's own mean), and
    its fixed length does not divide by the number of rows.
    """
    mask, tolerance = golden["loss_mask"] > 0, TOLERANCE[precision]
    dtype = np.float64 if precision == "f64" else np.float32
    values, (num_rows, width) = np.where(mask, golden["loss_mat"], 0.0), mask.shape
    used, num_tokens = mask.any(axis=1).sum(), mask.sum()
    for mode in (m for m in MODES if f"verl_{m}_{precision}" in golden):
        weight = np.asarray(weights(mask, mode, width, dtype))
        close((weight * values).sum(), golden[f"verl_{mode}_{precision}"], tolerance)
        close(weight, golden[f"verl_grad_{mode}_{precision}"], tolerance)
        part = np.asarray(weights(whole_batch(mask, 97, 13), mode, 64, dtype))[:num_rows, :width]
        close(4.0 * (part * values).sum(), golden[f"verl_dp4_{mode}_{precision}"], tolerance)
        theirs = golden.get(f"eml_{mode}_{precision}")
        if theirs is None:
            continue
        plain = make_normaliser(mode, width) if mode != "seq_mean_token_mean" else normalisers.sequence_mean_token_mean
        total = float(jnp.sum(plain(jnp.asarray(mask), rollouts(mask, logp_old=np.zeros(mask.shape, dtype))) * values))
        factor = {
            "token_mean": num_tokens / (num_tokens + 1e-8),
            "seq_mean_token_sum_norm": used,
        }.get(mode, used / num_rows)
        if used < num_rows and mode == "seq_mean_token_mean":
            assert np.isnan(theirs)
        else:
            close(total * factor, theirs, tolerance)


def check_group_advantages(golden, precision):
    """`base_groupadv_*`: verl; a row that is a group of its own gets the raw reward in all but the vectorised RLOO.

    Groups of equal rewards are exactly 0 here; in the sources rounding noise may be left, in float32 as much as 0.02.
    """
    mask, group, scores = golden["response_mask"] > 0, golden["index"], golden["scores"]
    epsilon = float(golden["eps"])
    methods = {
        "adv_grpo_std": (grpo(epsilon=epsilon, singleton="raw"), 1e-12),
        "adv_grpo_nostd": (grpo(scale_rewards="none", epsilon=1e-300, singleton="raw"), 1e-12),
        "adv_grpo_vectorized_std_f32": (grpo(epsilon=epsilon, singleton="raw"), TOLERANCE["f32"]),
        "adv_rloo": (rloo(singleton="raw"), 1e-12),
        "adv_rloo_vectorized": (rloo(), 1e-12),
    }
    alike = np.array([(group == g).sum() > 1 and np.ptp(scores[group == g]) == 0 for g in group])
    for key, (estimator, tolerance) in methods.items():
        ours, theirs = estimate(estimator, scores, group, mask), golden[key]
        assert not ours[alike].any()
        check_group_rows(ours[~alike], theirs[~alike], group[~alike], tolerance)


def check_grpo_advantage(golden, precision):
    """`entropy_grpo_advantage*`: verl, a loop and a vectorised version in float32."""
    mask, group = golden["response_mask"] > 0, golden["group"]
    for key, scale, tolerance in (
        ("grpo_std", "group", 1e-12),
        ("grpo_nostd", "none", 1e-12),
        ("grpo_vec_std", "group", TOLERANCE["f32"]),
        ("grpo_vec_nostd", "none", TOLERANCE["f32"]),
    ):
        ours = estimate(grpo(scale_rewards=scale, singleton="raw"), golden["rewards"], group, mask)
        check_group_rows(ours, golden[key], group, tolerance)
    single = np.array([(group == g).sum() == 1 for g in group])
    assert not estimate(grpo(), golden["rewards"], group, mask)[single].any()


def check_trl_advantages(golden, precision):
    """`base_trl_adv_*`: TRL's GRPO and RLOO; clipping and divergence enter the reward before the estimator."""
    rewards = golden["rewards_per_func"]
    mask = np.ones((len(rewards), 1), bool)
    group = np.arange(len(rewards)) // int(golden["num_generations"])
    weight, epsilon = tuple(golden["reward_weights"].tolist()), float(golden["eps"])
    for scale in ("group", "batch", "none"):
        ours = estimate(grpo(scale_rewards=scale, epsilon=epsilon, reward_weights=weight), rewards, group, mask)
        tolerance = 1e-12 if scale == "none" else FLOAT32_SCALAR
        close(ours[:, 0], golden[f"adv_grpo_{scale}"], tolerance)
    scorable = ~np.isnan(rewards).all(axis=1)
    total = np.where(scorable, np.nansum(rewards, axis=1), np.nan)
    drift = np.where(golden["completion_mask"] > 0, golden["old_logps"] - golden["ref_logps"], 0.0).sum(axis=1)
    for key, reward in (
        ("adv_rloo", total),
        ("adv_rloo_clip", np.clip(total, -0.5, 0.5)),
        ("adv_rloo_kl", total - float(golden["beta"]) * drift),
    ):
        close(estimate(rloo(), reward, group, mask)[:, 0], golden[key], 1e-12)


DIVERGENCES = {
    "k1": kl_reference.k1,
    "kl": kl_reference.k1,
    "k2": kl_reference.k2,
    "mse": kl_reference.k2,
    "k3": kl_reference.k3,
    "low_var_kl": kl_reference.k3,
    "k3plus": kl_reference.k3_straight_through,
    "low_var_klplus": kl_reference.k3_straight_through,
    "k2plus": kl_reference.k2,
    "abs": kl_cov.abs_log_ratio,
}


def divergence(golden, function, dtype):
    """Value `[B, T]` and gradient of the sum, with the reference also as the old policy."""
    log_prob, ref = (jnp.asarray(golden[k], dtype) for k in ("logprob", "ref_logprob"))
    batch = rollouts(np.ones(ref.shape, bool), logp_old=ref, token_data={"ref_log_prob": ref})

    def total(x):
        value = function({"log_prob": x}, initial_plan(batch, jnp.zeros_like(x)), batch)
        return jnp.sum(value), value

    (_, value), gradient = jax.value_and_grad(total, has_aux=True)(log_prob)
    return np.asarray(value), np.asarray(gradient)


def check_divergence(golden, name, value_key, gradient_key, precision):
    """Where verl's clamps act (a value above 10, |d| above 20), k3 has its own value and gradient here."""
    if value_key not in golden:
        return
    dtype = np.float64 if precision == "f64" else np.float32
    value, gradient = divergence(golden, DIVERGENCES[name], dtype)
    difference = (golden["logprob"] - golden["ref_logprob"]).astype(np.float64)
    own = np.exp(-np.maximum(difference, -20.0)) - 1.0 + difference
    clamped = (
        (np.abs(difference) >= 20.0) | (own > 10.0) if name.startswith(("k3", "low")) else np.zeros(own.shape, bool)
    )
    tolerance = TOLERANCE[precision]
    close(value[~clamped], golden[value_key][~clamped], tolerance)
    straight = name.endswith("plus")
    close(gradient[~clamped | straight], golden[gradient_key][~clamped | straight], tolerance)
    inner = clamped & (difference > -20.0)
    close(value[inner], own[inner], tolerance)
    if not straight:
        close(gradient[inner], (1.0 - np.exp(-difference))[inner], tolerance)
        assert np.isfinite(gradient).all() and not golden[gradient_key][clamped].any() and gradient[clamped].all()


def check_kl(golden, precision):
    """`base_kl_*`."""
    for name in DIVERGENCES:
        check_divergence(golden, name, f"val_{name}", f"grad_{name}", precision)


def check_kl_penalty(golden, precision):
    """`entropy_verl_kl_penalty_*`."""
    for name in DIVERGENCES:
        check_divergence(golden, name, f"{name}_{precision}", f"{name}_grad_{precision}", precision)


def check_full_divergence(golden, precision):
    """`base_klfull_*`: the term over the whole vocabulary, from logits."""
    logits, ref = jnp.asarray(golden["logits"]), jnp.asarray(golden["ref_logits"])
    mechanism = kl_reference.kl_reference(beta=1.0, estimator="full", normaliser=normalisers.token_sum)
    batch = rollouts(np.ones(logits.shape[:2], bool))
    advantage = jnp.zeros(logits.shape[:2])

    @jax.jit
    def value(z):
        return features.kl(z, ref)

    plan = update(mechanism, signals(batch, log_prob=advantage, reference_kl=value(logits)), advantage)

    def loss(z):
        term = mechanism.terms["reference_kl"]({"reference_kl": value(z)}, plan, batch)
        return jnp.sum(plan.terms["reference_kl"] * term), term

    (_, term), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(logits)
    close(term, golden["reverse_kl"], 1e-12)
    close(gradient, golden["grad_reverse_kl"], 1e-12)


FAMILIES = {
    "entropy_verl_vanilla_*": (check_vanilla, BOTH),
    "entropy_verl_clip_cov_*": (check_clip_cov, BOTH),
    "entropy_verl_kl_cov_*": (check_kl_cov, BOTH),
    "entropy_emlrepo_losses*": (check_authors_losses, BOTH),
    "entropy_agg_loss_*": (check_aggregation_in_two_sources, BOTH),
    "entropy_verl_kl_penalty_*": (check_kl_penalty, BOTH),
    "entropy_grpo_advantage*": (check_grpo_advantage, DOUBLE),
    "base_pl_vanilla_*": (check_policy_loss, DOUBLE),
    "base_pl_reinforce_*": (check_reinforce, DOUBLE),
    "base_agg_*": (check_aggregation, DOUBLE),
    "base_groupadv_*": (check_group_advantages, DOUBLE),
    "base_kl_*": (check_kl, DOUBLE),
    "base_klfull_*": (check_full_divergence, DOUBLE),
    "base_trl_adv_*": (check_trl_advantages, DOUBLE),
}


test_released_code = make_test(FAMILIES)
