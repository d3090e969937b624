"""Stored outputs of released code: policy-gradient losses other than PPO's; see `golden_cases`."""

import json

import jax.numpy as jnp
import numpy as np
from golden_cases import BOTH, DOUBLE, TOLERANCE, Case, clip_range_of, close, make_test
from golden_test import check_policy_loss
from toy import loss_and_gradient, rollouts, signals, update

from jentropy import compose, normalisers, surrogates
from jentropy.aliases import loss_type
from jentropy.mechanisms.clip_range import clip_range
from jentropy.mechanisms.entropy_bonus import entropy_bonus
from jentropy.mechanisms.kl_reference import kl_reference

GSPO_TOKEN = surrogates.gspo(form="token")


def check_gspo(golden, precision):
    """`base_pl_gspo_*`: the token form; with one advantage in each row, the sequence form is the same."""
    check_policy_loss(golden, precision, GSPO_TOKEN)
    case = Case(golden, precision)
    assert all(np.ptp(row[kept]) == 0.0 for row, kept in zip(golden["advantages"], case.mask) if kept.any())
    plan = case.plan(clip_range_of(case.hp))
    for key in (k for k in golden if k.startswith("loss__") and "tok_" not in k and "isw_" not in k):
        mode = key.removeprefix("loss__")
        value, gradient, _ = case.evaluate(plan, mode, surrogate=surrogates.gspo())
        case.check(value, gradient, f"__{mode}")


def check_cispo(golden, precision):
    check_policy_loss(golden, precision, surrogates.cispo())


def check_verl(golden, precision, surrogate):
    """`entropy_verl_{gspo,cispo}_*`: the loss of each token, its averages, and metrics."""
    case = Case(golden, precision)
    plan = case.plan(clip_range_of(case.hp))
    assert case.modes()
    for mode in case.modes():
        value, gradient, metrics = case.evaluate(plan, mode, surrogate=surrogate)
        case.check(value, gradient, f"_{mode}_{precision}")
    for name in ("pg_clipfrac", "ppo_kl"):
        case.check_mean(metrics, f"actor/{name}", name, f"_{precision}")
    token_loss, _ = surrogate(case.signals.scores, plan, case.signals.batch)
    close(token_loss, np.where(case.mask, golden[f"token_loss_{precision}"], 0.0), TOLERANCE[precision])


def check_verl_gspo(golden, precision):
    check_verl(golden, precision, GSPO_TOKEN)


def check_verl_cispo(golden, precision):
    check_verl(golden, precision, surrogates.cispo())


NOT_OURS = {"sapo", "vespo", "luspo", "opmask", "klbias"}
"""Of TRL's: other objectives, the mask of off-policy sequences, the divergence times the ratio."""

ELSEWHERE = {"topq"}
"""Of TRL's: checked with its mechanism."""


class TrlCase:
    """The inputs of TRL's losses: an advantage per row, TRL's defaults, and what each stored loss sets."""

    def __init__(self, golden):
        self.golden = golden
        self.mask = golden["completion_mask"] > 0
        self.log_prob = golden["per_token_logps"]
        self.rows = self.mask.any(axis=1)

    def run(self, *, old="old_logps", high=None, low=None, surrogate=surrogates.ratio, normaliser, weight=None, **more):
        batch = rollouts(self.mask, logp_old=self.golden[old], token_data={"ref_log_prob": self.golden["ref_logps"]})
        scored = signals(batch, log_prob=self.log_prob, entropy=self.golden["entropies"])
        low = float(self.golden["epsilon"]) if low is None else low
        chain = compose.chain(clip=clip_range(epsilon_low=low, epsilon_high=low if high is None else high), **more)
        advantage = jnp.asarray(np.broadcast_to(self.golden["advantages"][:, None], self.mask.shape))
        plan = update(chain, scored, advantage)
        if weight is not None:
            plan = plan.replace(pg_weight=plan.pg_weight * jnp.asarray(weight))
        return loss_and_gradient(plan, scored, surrogate=surrogate, normaliser=normaliser, terms=chain.terms)[:2]


def check_trl_losses(golden, precision):
    """`base_trl_loss_*`: TRL averages rows and divides by a fixed length with the empty rows counted.

    An empty row of its sequence-level RLOO adds minus its advantage to the value: a ratio of 1, no gradient.
    """
    del precision
    case = TrlCase(golden)
    per_row = {"normaliser": normalisers.sequence_mean_token_mean}
    per_token = {"normaliser": normalisers.token_mean}
    fixed = {"normaliser": normalisers.fixed_length(length=int(golden["max_completion_length"]))}
    beta, coef, delta, cap = (
        float(golden.get(k, v)) for k, v in (("beta", 0.04), ("entropy_coef", 0.01), ("delta", 1.5), ("cap", 5.0))
    )
    runs = {
        "grpo": per_row,
        "bnpo": per_token,
        "dr_grpo": fixed,
        "dapo": {"high": 0.28, **per_token},
        "gspo": {"low": 3e-4, "high": 4e-4, "surrogate": surrogates.gspo(), **per_row},
        "cispo": {"surrogate": surrogates.cispo(cap=cap), **per_token},
        "delta": {"surrogate": surrogates.dual_clip(clip_ratio_c=delta), **per_token},
        "kl": {"kl": kl_reference(beta=beta, normaliser=normalisers.sequence_mean_token_mean), **per_row},
        "entbonus": {"bonus": entropy_bonus(entropy_coef=coef), **per_token},
        "onpolicy": {"old": "per_token_logps", **per_token},
        "vllmis": {"weight": golden["is_ratio"], **per_token},
        "rloo_seqclip": {"surrogate": surrogates.sequence_ratio, **per_row},
    }
    stored = {k.removeprefix("loss__") for k in golden if k.startswith("loss__")}
    assert stored <= runs.keys() | NOT_OURS | ELSEWHERE
    for key in stored & runs.keys():
        value, gradient = case.run(**runs[key])
        scale = 1.0 if runs[key]["normaliser"] is normalisers.token_mean else case.rows.mean()
        empty = -np.sum(golden["advantages"][~case.rows]) / len(case.rows) if key == "rloo_seqclip" else 0.0
        close(value * scale + empty, golden[f"loss__{key}"], 1e-12)
        close(gradient * scale, golden[f"grad__{key}"], 1e-12)


def check_trl_settings(golden, precision):
    """`entropy_trl_compute_loss*`: TRL's loss under its own settings, with the names of `aliases.loss_type`.

    Accumulated over several micro-batches TRL divides by their number, or by the tokens of all of them. Settings with
    the top-entropy mask are checked with its mechanism.
    """
    mask, dtype = golden["response_mask"] > 0, np.float64 if precision == "f64" else np.float32
    nonempty = mask.any(axis=1).mean()
    batch = rollouts(
        mask,
        logp_old=golden["old_log_prob"].astype(dtype),
        token_data={"ref_log_prob": golden["ref_log_prob"].astype(dtype)},
    )
    scored = signals(batch, **{k: golden[v].astype(dtype) for k, v in SCORES.items()})
    advantage = jnp.asarray(np.broadcast_to(golden["advantages"][:, None], mask.shape), dtype)
    for name, hp in json.loads(str(golden["hparams"])).items():
        if hp["loss_type"] in NOT_OURS or "top_entropy_quantile" in hp:
            continue
        cap = hp.get("epsilon_high") if hp["loss_type"] == "cispo" else None
        kind = loss_type(hp["loss_type"], delta=hp.get("delta"), epsilon_high=cap, max_completion_length=32)
        chain = compose.chain(
            clip=clip_range(epsilon_low=0.2, epsilon_high=0.28),
            kl=kl_reference(beta=hp.get("beta", 0.0), normaliser=kind.normaliser),
        )
        bonus = entropy_bonus(entropy_coef=hp.get("entropy_coef", 0.0))
        plan = update(chain, scored, advantage)
        value, gradient, _ = loss_and_gradient(
            plan, scored, surrogate=kind.surrogate, normaliser=kind.normaliser, terms=chain.terms
        )
        entropy = np.asarray(update(bonus, scored, advantage).terms["entropy"])
        steps = hp.get("current_gradient_accumulation_steps", 1)
        scale = 1.0 / steps if kind.normaliser is normalisers.token_mean else nonempty / steps
        entropy_scale = 1.0 / steps
        if "n_items" in hp:
            scale = entropy_scale = mask.sum() / hp["n_items"]
        bonus_value = (entropy * np.where(mask, golden["entropies"], 0.0)).sum()
        close(value * scale + bonus_value * entropy_scale, golden[f"{name}__loss_{precision}"], TOLERANCE[precision])
        if precision == "f64":
            close(gradient * scale, golden[f"{name}__grad_logp_f64"], TOLERANCE[precision])
            close(entropy * entropy_scale, golden[f"{name}__grad_entropy_f64"], TOLERANCE[precision])


SCORES = {"log_prob": "log_prob", "entropy": "entropies"}

FAMILIES = {
    "base_pl_gspo_*": (check_gspo, DOUBLE),
    "base_pl_cispo_*": (check_cispo, DOUBLE),
    "entropy_verl_gspo_*": (check_verl_gspo, BOTH),
    "entropy_verl_cispo_*": (check_verl_cispo, BOTH),
    "base_trl_loss_*": (check_trl_losses, DOUBLE),
    "entropy_trl_compute_loss*": (check_trl_settings, BOTH),
}

test_released_code = make_test(FAMILIES)
