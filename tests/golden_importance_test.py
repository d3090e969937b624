"""Stored outputs of released code: importance weights and rejection of tokens; see `golden_cases`."""

import re

import numpy as np
import toy
from golden_cases import DOUBLE, close, make_test

from jentropy import compose
from jentropy.mechanisms.importance_correction import importance_correction, rejection


def plan_of(mechanism, log_ratio, mask):
    """The plan after `mechanism`, with `log_ratio` as trainer's minus sampler's log-probability."""
    log_ratio = np.asarray(log_ratio, np.float64)
    batch = toy.rollouts(mask, logp_old=log_ratio)
    return toy.update(mechanism, toy.signals(batch, log_prob=log_ratio), np.zeros(mask.shape))


def bounds(text):
    """`"2p0"` is 2.0 alone, `"0p5_5p0"` two numbers."""
    return [float(number.replace("p", ".")) for number in text.split("_")]


def normalised(weight, mask, level):
    """verl's division by the mean weight: token means divide by `n + 1e-8`."""
    length = mask.sum(axis=1)
    if level == "token":
        return weight / (weight[mask].sum() / (mask.sum() + 1e-8))
    per_row = np.where(mask, weight, 0.0).sum(axis=1) / (length + 1e-8)
    return weight / per_row[length > 0].mean()


def rejections(names, texts, denominator):
    """The chain of verl's options, such as `token_k1+seq_mean_k3` with the bounds `2p0+0p2`.

    Its k1 options bound the inverse of the ratio; a single number of theirs is also the inverse of the other bound.
    """
    parts = {}
    for name, text in zip(names.split("+"), texts.split("+"), strict=True):
        level, statistic = name.rsplit("_", 1)
        options = {"statistic": statistic, "upper": bounds(text)[-1]}
        if statistic == "k1":
            high, low = bounds(text)[-1], bounds(text)[0] if "_" in text else 1.0 / bounds(text)[0]
            options = {"lower": 1.0 / high, "upper": 1.0 / low}
        parts[name] = rejection(level=LEVELS[level], denominator=denominator, **options)
    return compose.chain(**parts)


LEVELS = {"token": "token", "seq_sum": "sequence", "seq_mean": "sequence_mean", "seq_max": "sequence_max"}


def check_rollout_correction(golden, precision):
    """`base_rolloutcorr_*`: verl."""
    del precision
    mask, log_ratio = golden["response_mask"] > 0, golden["log_ratio"]
    for key in (k for k in golden if k.startswith("w__")):
        level, text, norm = re.fullmatch(r"w__(token|sequence)__(.*)__bn([01])", key).groups()
        *low, high = bounds(text)
        options = {"level": level, "rollout_is_threshold": high}
        options |= {"mode": "mask", "lower": low[0]} if low else {}
        weight = np.asarray(plan_of(importance_correction(**options), log_ratio, mask).pg_weight)
        if norm == "1":
            ours = plan_of(importance_correction(batch_normalise=True, **options), log_ratio, mask).pg_weight
            weight = normalised(weight, mask, level)
            close(ours, weight, 1e-7)
        close(weight, golden[key], 1e-12)
    for key in (k for k in golden if k.startswith("mask__")):
        _, names, texts = key.split("__")
        plan = plan_of(rejections(names, texts, "kept"), log_ratio, mask)
        np.testing.assert_array_equal(plan.pg_weight, golden[key], err_msg=key)
        np.testing.assert_array_equal(plan.counted, golden[key] > 0)
        plan = plan_of(rejections(names, texts, "all"), log_ratio, mask)
        np.testing.assert_array_equal(plan.pg_weight, golden[key])
        np.testing.assert_array_equal(plan.counted, mask)


def check_vllm_importance(golden, precision):
    """`base_trl_vllmis_*`: TRL, with NaN among the sampler's log-probabilities and no clamp of the log-ratio."""
    del precision
    mask = golden["completion_mask"] > 0
    batch = toy.rollouts(mask, logp_old=golden["old_logps"])
    signals = toy.signals(batch.replace(logp_sampler=golden["sampling_logps"]), log_prob=golden["old_logps"])
    for key in (k for k in golden if k.startswith("ratio__")):
        level, mode, low, high = re.fullmatch(r"ratio__(token|sequence)_(truncate|mask)__(.*)_(.*)", key).groups()
        low, high = (default if x == "none" else float(x) for x, default in ((low, 0.0), (high, np.inf)))
        options = {"level": level, "mode": mode, "lower": low, "rollout_is_threshold": high}
        plan = toy.update(importance_correction(**options), signals, np.zeros(mask.shape))
        clamped = np.where(golden[key] > 0.0, np.clip(golden[key], np.exp(-20.0), np.exp(20.0)), 0.0)
        close(plan.pg_weight, np.where(mask, clamped, 0.0), 1e-12)


FAMILIES = {
    "base_rolloutcorr_*": (check_rollout_correction, DOUBLE),
    "base_trl_vllmis_*": (check_vllm_importance, DOUBLE),
}

test_released_code = make_test(FAMILIES)
