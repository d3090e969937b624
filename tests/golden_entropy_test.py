"""Stored outputs of released code: entropy mechanisms; see `golden_cases`."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import BOTH, DOUBLE, FLOAT32_SCALAR, TOLERANCE, Case, clip_range_of, close, make_test
from toy import loss_and_gradient, rollouts, signals, update

from jentropy import compose, features, normalisers, stats, surrogates
from jentropy.base import initial_plan
from jentropy.mechanisms import adaptive_entropy as adaptive
from jentropy.mechanisms.adaptive_entropy import AdaptiveEntropyState, adaptive_entropy
from jentropy.mechanisms.clip_range import clip_range
from jentropy.mechanisms.entropy_advantage import entropy_advantage
from jentropy.mechanisms.entropy_bonus import entropy_bonus
from jentropy.mechanisms.kl_reference import kl_reference
from jentropy.mechanisms.top_entropy import top_entropy


def changed(mechanism, **numbers):
    """The mechanism with these numbers in its state, out of their range too."""
    return mechanism._replace(init=lambda: mechanism.init()._replace(**numbers))


def select(entropy, mask, fraction, dtype=None, **options):
    """The tokens that `top_entropy` keeps; the fraction 0, which it refuses, by way of its state."""
    with pytest.raises(ValueError, match=r"top_entropy_quantile must be in \(0, 1\], got 0\.0"):
        top_entropy(top_entropy_quantile=0.0)
    mechanism = changed(top_entropy(**options), top_entropy_quantile=stats.fraction_parts(fraction))
    scored = signals(rollouts(mask), log_prob=jnp.zeros(mask.shape), entropy=jnp.asarray(entropy, dtype))
    return np.asarray(update(mechanism, scored, jnp.ones(mask.shape)).pg_weight > 0.0)


def check_official_selection(entropy, mask, fraction, stored):
    """`torch.topk` takes any of the tokens tied with the last one."""
    ours = select(entropy, mask, fraction)
    assert ours.sum() == stored.sum() and not (ours & ~mask).any()
    last = entropy[ours].min(initial=np.inf)
    np.testing.assert_array_equal(ours & (entropy != last), stored & (entropy != last))


def check_official(golden, precision):
    """`entropy_top8020_official*`: the loss is that of the fraction 0.2, averaged over the selected tokens.

    The file does not hold its clip range: it is that of the authors' recipes, 0.2 and 0.28.
    """
    case = Case({"hp_clip_ratio_high": np.float64(0.28), **golden}, precision)
    for key in (k for k in golden if k.startswith("mask_ratio")):
        check_official_selection(golden["entropies"], case.mask, float(key[10:]), golden[key] > 0)
    losses = [k.removeprefix("loss_") for k in golden if k.startswith("loss_")]
    ours = select(golden["entropies"], case.mask, 0.2)
    if not losses or not np.array_equal(ours, golden["mask_ratio0.2"] > 0):
        return
    scored = case.signals.replace(scores={**case.signals.scores, "entropy": jnp.asarray(golden["entropies"])})
    chain = compose.chain(clip=clip_range_of(case.hp), top=top_entropy(denominator="selected"))
    plan = update(chain, scored, case.advantage)
    np.testing.assert_array_equal(plan.counted, ours)
    for key in losses:
        surrogate = surrogates.dual_clip(clip_ratio_c=case.hp["clip_ratio_c"])
        case.check(*case.evaluate(plan, key, surrogate=surrogate)[:2], f"_{key}")


RANKS = {"response_mask": "mask", "entropies": "entropies"}


def check_trl_quantile(golden, precision):
    """`entropy_trl_top_quantile_*`: of one process, of the first of two, of entropies in bfloat16.

    The reference compares bfloat16 entropies with a threshold that it rounds to bfloat16 too (`mask_bf16_*`); ours is
    the comparison without that (`mask_bf16exact_*`).
    """
    mask, entropy = golden["response_mask"] > 0, golden["entropies"]
    for key in (k for k in golden if k.startswith("mask_rho")):
        fraction = float(key.removeprefix("mask_rho"))
        np.testing.assert_array_equal(select(entropy, mask, fraction, rule="quantile"), golden[key])
        if f"mask_2proc_rho{fraction}" in golden:
            both = [np.concatenate([golden[k], golden[f"{v}_rank1"]]) for k, v in RANKS.items()]
            of_two = select(both[1], both[0] > 0, fraction, rule="quantile")[: len(mask)]
            np.testing.assert_array_equal(of_two, golden[f"mask_2proc_rho{fraction}"])
        if f"mask_bf16exact_rho{fraction}" in golden:
            rounded = select(entropy, mask, fraction, jnp.bfloat16, rule="quantile")
            np.testing.assert_array_equal(rounded, golden[f"mask_bf16exact_rho{fraction}"])
        if mask.any():
            found = stats.quantile(jnp.asarray(entropy), jnp.asarray(mask), jnp.asarray(1.0 - fraction))
            close(found, golden[f"thr_rho{fraction}"], TOLERANCE["f32"])


def check_trl_losses(golden, precision):
    """`base_trl_loss_*`: the loss with the fraction 0.2, divided by all tokens."""
    mask = golden["completion_mask"] > 0
    scored = signals(
        rollouts(mask, logp_old=golden["old_logps"]), log_prob=golden["per_token_logps"], entropy=golden["entropies"]
    )
    epsilon, fraction = float(golden["epsilon"]), float(golden.get("top_entropy_quantile", 0.2))
    chain = compose.chain(
        clip=clip_range(epsilon_low=epsilon), top=top_entropy(top_entropy_quantile=fraction, rule="quantile")
    )
    plan = update(chain, scored, jnp.asarray(np.broadcast_to(golden["advantages"][:, None], mask.shape)))
    value, gradient, _ = loss_and_gradient(plan, scored, surrogate=surrogates.ratio, normaliser=normalisers.token_mean)
    close(value, golden["loss__topq"], TOLERANCE[precision])
    close(gradient, golden["grad__topq"], TOLERANCE[precision])


def trl_normaliser(loss_type, mask, length):
    """TRL's average, and the factor for the empty rows that it counts."""
    rows = mask.any(axis=1).mean()
    return {
        "grpo": (normalisers.sequence_mean_token_mean, rows),
        "dr_grpo": (normalisers.fixed_length(length=length), rows),
    }.get(loss_type, (normalisers.token_mean, 1.0))


def check_trl_settings(golden, precision):
    """`entropy_trl_compute_loss*`, the settings with a fraction: divergence on all tokens, loss on the selected ones.

    TRL's entropy bonus is that of the selected tokens only, ours of all: their part is taken from the stored gradient.
    """
    mask, dtype = golden["response_mask"] > 0, np.float64 if precision == "f64" else np.float32
    old, ref, log_prob, entropy = (
        golden[k].astype(dtype) for k in ("old_log_prob", "ref_log_prob", "log_prob", "entropies")
    )
    scored = signals(rollouts(mask, logp_old=old, token_data={"ref_log_prob": ref}), log_prob=log_prob, entropy=entropy)
    advantage = jnp.asarray(np.broadcast_to(golden["advantages"][:, None], mask.shape), dtype)
    settings = {k: v for k, v in json.loads(str(golden["hparams"])).items() if "top_entropy_quantile" in v}
    assert settings
    for name, hp in settings.items():
        assert hp["loss_type"] in ("grpo", "bnpo", "dr_grpo", "dapo")
        normaliser, scale = trl_normaliser(hp["loss_type"], mask, 32)
        chain = compose.chain(
            clip=clip_range(epsilon_low=0.2, epsilon_high=0.28),
            top=top_entropy(top_entropy_quantile=hp["top_entropy_quantile"], rule="quantile"),
            kl=kl_reference(beta=hp.get("beta", 0.0), normaliser=normaliser),
            bonus=entropy_bonus(entropy_coef=hp.get("entropy_coef", 0.0)),
        )
        plan = update(chain, scored, advantage)
        theirs = golden[f"{name}__grad_entropy_f64"]
        assert not theirs[np.asarray(plan.pg_weight) == 0.0].any()
        np.testing.assert_array_equal(np.asarray(plan.terms["entropy"]) != 0.0, mask & ("entropy_coef" in hp))
        plan = plan.replace(terms={k: v for k, v in plan.terms.items() if k != "entropy"})
        value, gradient, _ = loss_and_gradient(
            plan, scored, surrogate=surrogates.ratio, normaliser=normaliser, terms=chain.terms
        )
        bonus = (theirs * np.where(mask, golden["entropies"], 0.0)).sum()
        close(value * scale + bonus, golden[f"{name}__loss_{precision}"], TOLERANCE[precision])
        if precision == "f64":
            close(gradient * scale, golden[f"{name}__grad_logp_f64"], TOLERANCE[precision])


def check_entropy_advantage(golden, precision):
    """`entropy_adv_shaping*`: also κ below 1, which flips signs and is refused here."""
    dtype = np.float64 if precision == "f64" else np.float32
    advantage, entropy = (golden[k].astype(dtype) for k in ("advantages", "entropies"))
    mask = golden["response_mask"] > 0 if "response_mask" in golden else np.ones(advantage.shape, bool)
    scored = signals(rollouts(mask), log_prob=jnp.zeros_like(entropy), entropy=entropy)
    for key in (k for k in golden if k.startswith("shaped_")):
        alpha, kappa = (float(x) for x in re.fullmatch(r"shaped_a([\d.e+-]+)_k([\d.e+-]+)", key).groups())
        if kappa < 1.0:
            with pytest.raises(ValueError, match=f"entropy_adv_kappa must be at least 1, got {kappa}"):
                entropy_advantage(entropy_adv_kappa=kappa)
        numbers = {"entropy_adv_alpha": jnp.asarray(alpha), "entropy_adv_kappa": jnp.asarray(kappa)}
        shaped = update(changed(entropy_advantage(), **numbers), scored, jnp.asarray(advantage)).advantage
        close(shaped, np.where(mask, golden[key], 0.0), TOLERANCE[precision])
        assert not np.asarray(shaped)[advantage == 0.0].any()


NAMES = {
    "entropy_target": ("target_ent", "target"),
    "entropy_coef_delta": ("delta_ent_coef", "delta"),
    "entropy_coef_min": ("min_ent_coef", "min"),
    "entropy_coef_max": ("max_ent_coef", "max"),
    "coef": ("init_ent_coef", "init"),
}


def controller_state(hp, rule) -> AdaptiveEntropyState:
    numbers = {ours: jnp.asarray(float(next(hp[k] for k in theirs if k in hp))) for ours, theirs in NAMES.items()}
    return adaptive_entropy(rule=rule).init()._replace(**numbers)


def run_controller(function, state, entropies):
    """`[n + 1]` coefficients and switches, before each entropy and after the last."""

    def step(state, entropy):
        return function(state, entropy), (state.coef, state.enabled)

    last, (coef, enabled) = jax.jit(lambda s, e: jax.lax.scan(step, s, e))(state, jnp.asarray(entropies))
    return np.append(coef, last.coef), np.append(enabled, last.enabled)


def applied_by_rollouts(rule, state, entropies):
    """The coefficient that the mechanism applies in each of two updates of a rollout of this entropy, `[n, 2]`."""
    mechanism = adaptive_entropy(rule=rule)
    batch = rollouts([[False, True]])

    def one(carry, xs):
        entropy, index = xs
        scored = signals(batch, log_prob=jnp.zeros((1, 2)), entropy=jnp.full((1, 2), entropy))
        scored = scored.replace(step=index // 2, update_index=index % 2)
        plan, carry = mechanism.update(initial_plan(batch, jnp.zeros((1, 2))), carry, scored, jax.random.key(0))
        return carry, -plan.terms["entropy"][0, 1]

    twice, index = np.repeat(entropies, 2), np.arange(2 * len(entropies), dtype=np.int32)
    return np.asarray(jax.jit(lambda s: jax.lax.scan(one, s, (twice, index)))(state)[1]).reshape(-1, 2)


def check_skywork_controller(golden, precision):
    """`entropy_skywork_controller_*`: the value and the switch before each entropy; switched off, a fixed bonus."""
    hp, entropies = json.loads(str(golden["hparams"])), golden["entropy_seq"]
    state = controller_state(hp, "skywork")
    if not hp["use_adapt_ent"]:
        assert golden["enabled"].all()
        fixed = update(entropy_bonus(entropy_coef=hp["init_ent_coef"]), *tiny_update())
        close(np.full(golden["value"].shape, -fixed.terms["entropy"][0, 0]), golden["value"], TOLERANCE[precision])
        return
    coef, enabled = run_controller(adaptive.skywork, state, entropies)
    close(coef, golden["value"], TOLERANCE[precision])
    np.testing.assert_array_equal(enabled, golden["enabled"] > 0)
    applied = applied_by_rollouts("skywork", state, entropies)
    for update_index in range(2):
        close(applied[:, update_index], (golden["value"] * golden["enabled"])[:-1], TOLERANCE[precision])


def tiny_update():
    return signals(rollouts([[True]]), log_prob=jnp.zeros((1, 1)), entropy=jnp.ones((1, 1))), jnp.zeros((1, 1))


def check_trl_controller(golden, precision):
    """`entropy_trl_adaptive_*`: the coefficient after each step, and what is applied in it: nothing in the first.

    What was applied is read off a float32 gradient.
    """
    state = controller_state(json.loads(str(golden["hparams"])), "trl")
    coef, _ = run_controller(adaptive.trl, state, golden["entropy_seq"])
    close(coef[1:], golden["coef_after"], TOLERANCE[precision])
    applied = applied_by_rollouts("trl", state, golden["entropy_seq"])
    for update_index in range(2):
        close(applied[:, update_index], np.abs(golden["applied_coef"]), max(TOLERANCE[precision], FLOAT32_SCALAR))


def check_skywork_loss(golden, precision):
    """`entropy_skywork_loss*`: the loss has the entropy of the logits, the controller sees the sampled estimate."""
    case, coefficient = Case(golden, precision), json.loads(str(golden["metric_all"]))["actor/entropy_coeff_realized"]
    logits = jnp.asarray(golden["logits"], case.dtype)
    entropy = jax.jit(features.entropy)(logits)
    scored = case.signals.replace(scores={**case.signals.scores, "entropy": entropy})
    mechanism = adaptive_entropy(
        entropy_coef_init=coefficient, entropy_coef_max=coefficient, entropy_estimate="sampled"
    )
    plan = update(compose.chain(clip=clip_range_of(case.hp), adaptive=mechanism), scored, case.advantage)
    seen, count = plan.metrics["adaptive_entropy/entropy"]
    close(seen / count, golden["metric_entropy"], TOLERANCE[precision])

    def bonus(z):
        term = mechanism.terms["entropy"]({"entropy": features.entropy(z)}, plan, scored.batch)
        return jnp.sum(plan.terms["entropy"] * jnp.where(case.mask, term, 0.0))

    of_entropy, gradient = jax.jit(jax.value_and_grad(bonus))(logits)
    value, of_log_prob, _ = case.evaluate(plan.replace(terms={}), "token_mean")
    close(value, golden["pg_loss"], TOLERANCE[precision])
    close(of_entropy, -coefficient * golden["entropy_mean"], TOLERANCE[precision])
    close(value + of_entropy, golden["total"], TOLERANCE[precision])
    close(of_log_prob, golden["grad_logp"], TOLERANCE[precision])
    close(gradient, golden["grad_logits"], TOLERANCE[precision])


FAMILIES = {
    "entropy_top8020_official*": (check_official, DOUBLE),
    "entropy_trl_top_quantile_*": (check_trl_quantile, BOTH),
    "base_trl_loss_*": (check_trl_losses, DOUBLE),
    "entropy_trl_compute_loss*": (check_trl_settings, BOTH),
    "entropy_adv_shaping*": (check_entropy_advantage, BOTH),
    "entropy_skywork_controller_*": (check_skywork_controller, DOUBLE),
    "entropy_skywork_loss*": (check_skywork_loss, DOUBLE),
    "entropy_trl_adaptive_*": (check_trl_controller, DOUBLE),
}

test_released_code = make_test(FAMILIES)
