"""Presets: complete, built without a conflict, with the numbers of their sources."""

import dataclasses
import warnings

import pytest

from jentropy import conflicts, normalisers, presets, surrogates
from jentropy.compose import parts
from jentropy.train.experiment import Reinforce

REQUIRED = {name: {"max_response_length": 7} for name in ("siren", "dr_grpo")}
"""What has no default, because it is the task's."""
NAMES = sorted(presets.PRESETS)
STAGE = {field.name for field in dataclasses.fields(Reinforce)} | {"learning_rate", "overlong_reward"}


def states(objective):
    return {part.method: part.state for part in parts(objective.mechanisms)}


def test_every_preset_has_companions_and_a_note():
    assert set(presets.COMPANIONS) == set(presets.RESCALE) == set(NAMES)
    assert all(presets.PRESETS[name].__doc__.count("Reference: ") == 1 for name in NAMES)
    assert all(set(companions) <= STAGE for companions in presets.COMPANIONS.values())


@pytest.mark.parametrize("name", NAMES)
def test_it_is_built_without_a_conflict(name):
    objective = presets.PRESETS[name](**REQUIRED.get(name, {}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        conflicts.check(objective, name)


def test_numbers_of_the_sources():
    def bounds(objective):
        state = states(objective)["clip_range"]
        return round(float(state.epsilon_low), 6), round(float(state.epsilon_high), 6)

    assert (
        bounds(presets.dapo())
        == (0.2, 0.28)
        == bounds(presets.eighty_twenty())
        == bounds(presets.siren(max_response_length=7))
    )
    assert bounds(presets.clip_cov_7b()) == (1.0, 1.0)
    assert "clip_range" not in states(presets.kl_cov_7b())
    for objective, wanted in ((presets.kl_cov_7b(), 2e-3), (presets.kl_cov_32b(), 2e-4)):
        fraction = states(objective)["kl_cov"].kl_cov_ratio
        assert float(fraction.numerator) / float(fraction.denominator) == pytest.approx(wanted)
    assert {"adaptive_entropy", "clip_range"} == set(states(presets.skywork_or1()))
    assert presets.dapo().surrogate == surrogates.dual_clip(clip_ratio_c=10.0)
    assert presets.dr_grpo(max_response_length=7).normaliser == normalisers.fixed_length(length=7)
    assert presets.reinforce_rej().surrogate is surrogates.reinforce
    assert presets.seed_grpo().mechanisms.requires == ("answer_id",)
    assert set(states(presets.dapo())) == {"clip_range"}
