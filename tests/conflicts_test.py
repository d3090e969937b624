"""Combinations that are refused or warned about, and that the others are left in peace."""

import warnings

import pytest

from jentropy import conflicts, normalisers, surrogates
from jentropy.advantages.grpo import grpo
from jentropy.advantages.qae import qae
from jentropy.advantages.rloo import rloo
from jentropy.base import Objective
from jentropy.compose import blockwise, chain, parts, quantity, stateless
from jentropy.mechanisms.adaptive_entropy import adaptive_entropy
from jentropy.mechanisms.ce_gppo import ce_gppo
from jentropy.mechanisms.clip_cov import clip_cov
from jentropy.mechanisms.clip_range import clip_range
from jentropy.mechanisms.entropy_advantage import entropy_advantage
from jentropy.mechanisms.entropy_band import entropy_band
from jentropy.mechanisms.entropy_bonus import entropy_bonus
from jentropy.mechanisms.kl_cov import kl_cov
from jentropy.mechanisms.siren import siren


def objective(estimator=None, surrogate=surrogates.ratio, normaliser=normalisers.token_mean, **mechanisms):
    return Objective(estimator or grpo(), chain(**mechanisms), surrogate, normaliser)


def test_parts_are_found_in_chains_and_blocks():
    inner = chain(a=clip_range(epsilon_low=0.25), b=blockwise(clip_cov(), rows=2))
    found = parts(chain(x=inner, y=stateless(_identity)))
    assert [part.method for part in found] == ["clip_range", "clip_cov", "conflicts_test"]
    assert float(found[0].state.epsilon_low) == 0.25


def _identity(plan, signals, key):
    return plan


FINE = {
    "grpo": objective(clip_range=clip_range()),
    "clip_cov": objective(clip_range=clip_range(), clip_cov=clip_cov(), entropy_bonus=entropy_bonus()),
    "kl_cov": objective(clip_range=clip_range(), kl_cov=kl_cov()),
    "gspo": objective(
        None, surrogates.gspo(), normalisers.sequence_mean_token_mean, a=clip_range(epsilon_low=3e-4, epsilon_high=4e-4)
    ),
    "qae": objective(qae(scale_rewards="group"), a=clip_cov()),
    "own": objective(mine=stateless(_identity, terms={"entropy": quantity("entropy")})),
}
WARNED = {
    "kl_cov and clip_cov": (objective(a=clip_cov(), b=kl_cov()), "same tokens"),
    "clip after kl_cov": (objective(a=kl_cov(), b=clip_range()), "clips the ratio again"),
    "unstandardised": (objective(rloo(), a=clip_range(), b=clip_cov()), "band of covariances is absolute"),
    "qae": (objective(qae(), a=clip_cov()), "band of covariances is absolute"),
    "sequence ratio": (objective(surrogate=surrogates.sequence_ratio), "sequence_mean_token_mean"),
    "dr_grpo": (objective(grpo(scale_rewards="none"), a=clip_cov()), "band of covariances is absolute"),
    "gspo and 0.2": (
        objective(None, surrogates.gspo(), normalisers.sequence_mean_token_mean, a=clip_range()),
        "does not clip the ratio",
    ),
    "gspo and token_mean": (objective(surrogate=surrogates.gspo()), "sequence_mean_token_mean"),
    "shaping after covariance": (objective(a=clip_cov(), b=entropy_advantage()), "already read the advantage"),
    "nothing to preserve": (objective(a=ce_gppo()), "does nothing"),
    "bonus and regulator": (objective(a=adaptive_entropy(), b=entropy_bonus()), "pulls the entropy away"),
    "bonus and guard": (objective(a=entropy_bonus(), b=entropy_band()), "pulls the entropy away"),
    "no token ratio": (objective(surrogate=surrogates.reinforce, a=kl_cov()), "are defined for surrogates.ratio"),
}
REFUSED = {
    "twice": (objective(a=clip_cov(), b=clip_cov()), "clip_cov stands in the chain twice"),
    "two regulators": (objective(a=siren(), b=adaptive_entropy()), "siren and adaptive_entropy both steer"),
    "band and target": (
        objective(a=entropy_band(), b=adaptive_entropy()),
        "entropy_band and adaptive_entropy both steer",
    ),
    "band and SIREN": (objective(a=entropy_band(), b=siren()), "siren and entropy_band both steer"),
    "two bands": (objective(a=entropy_band(), b=entropy_band()), "entropy_band stands in the chain twice"),
    "late bounds": (objective(a=clip_cov(), b=clip_range()), "clip_range stands behind clip_cov"),
    "late bounds in a block": (objective(a=blockwise(clip_cov(), rows=2), b=clip_range()), "stands behind clip_cov"),
}


@pytest.mark.parametrize("name", FINE)
def test_what_composes_is_left_in_peace(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        conflicts.check(FINE[name], "stage 'rl'")


@pytest.mark.parametrize("name", WARNED)
def test_what_is_most_likely_a_mistake_is_warned_about(name):
    combination, message = WARNED[name]
    with pytest.warns(UserWarning, match=f"stage 'rl': .*{message}"):
        conflicts.check(combination, "stage 'rl'")


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_meaning_is_refused(name):
    combination, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"stage 'rl': .*{message}"):
        conflicts.check(combination, "stage 'rl'")
