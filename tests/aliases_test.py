"""Names of verl and TRL: what they stand for, and what is refused."""

import pytest

from jentropy import normalisers, surrogates
from jentropy.aliases import LossType, loss_agg_mode, loss_type

MODES = {
    "token-mean": normalisers.token_mean,
    "token-sum": normalisers.token_sum,
    "seq-mean-token-sum": normalisers.sequence_mean_token_sum,
    "seq-mean-token-mean": normalisers.sequence_mean_token_mean,
    "seq-mean-token-sum-norm": normalisers.fixed_length(length=64),
}
TYPES = {
    "grpo": LossType(surrogates.ratio, normalisers.sequence_mean_token_mean),
    "bnpo": LossType(surrogates.ratio, normalisers.token_mean),
    "dr_grpo": LossType(surrogates.ratio, normalisers.fixed_length(length=64)),
    "dapo": LossType(surrogates.ratio, normalisers.token_mean),
}


@pytest.mark.parametrize("name", MODES)
def test_loss_agg_mode(name):
    assert loss_agg_mode(name, length=64) == MODES[name]


@pytest.mark.parametrize("name", TYPES)
def test_loss_type(name):
    options = {"max_completion_length": 64}
    assert loss_type(name, **options) == TYPES[name]
    sequence = loss_type(name, importance_sampling_level="sequence", **options)
    assert sequence == TYPES[name]._replace(surrogate=surrogates.gspo())
    two_sided = loss_type(name, delta=4.0, **options)
    assert two_sided == TYPES[name]._replace(surrogate=surrogates.dual_clip(clip_ratio_c=4.0))


def test_cispo_has_the_cap():
    assert loss_type("cispo", epsilon_high=5.0) == (surrogates.cispo(cap=5.0), normalisers.token_mean)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mean", {}, r"loss_agg_mode must be one of \['token-mean', .*'seq-mean-token-sum-norm'\], got 'mean'"),
        ("seq-mean-token-sum-norm", {}, "seq-mean-token-sum-norm needs length: a constant number of tokens"),
        ("seq-mean-token-sum-norm", {"length": 0}, "length must be at least 1, got 0"),
    ],
)
def test_refusals_of_loss_agg_mode(name, options, message):
    with pytest.raises(ValueError, match=message):
        loss_agg_mode(name, **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sapo", {}, r"loss_type must be one of \['grpo', 'bnpo', 'dapo', 'cispo', 'dr_grpo'\], got 'sapo'"),
        ("dr_grpo", {}, "dr_grpo needs max_completion_length: a constant number of tokens"),
        ("grpo", {"importance_sampling_level": "row"}, "importance_sampling_level must be one of .*, got 'row'"),
        (
            "cispo",
            {"importance_sampling_level": "sequence", "epsilon_high": 5.0},
            r"importance_sampling_level must be one of \['token'\] with loss_type = 'cispo', got 'sequence'",
        ),
        ("cispo", {}, "epsilon_high must be given with loss_type = 'cispo': its cap, got None"),
        ("cispo", {"epsilon_high": 0.28}, r"cap must be at least 1 or None, got 0\.28"),
        ("cispo", {"epsilon_high": 5.0, "delta": 4.0}, r"delta must be None with cispo and with sequences, got 4\.0"),
        ("dapo", {"epsilon_high": 0.28}, "epsilon_high must be None with loss_type = 'dapo': set it in clip_range"),
        ("dapo", {"delta": 0.9}, r"clip_ratio_c must be above 1, got 0\.9"),
        ("grpo", {"importance_sampling_level": "sequence", "delta": 4.0}, "delta must be None with cispo and with"),
    ],
)
def test_refusals_of_loss_type(name, options, message):
    with pytest.raises(ValueError, match=message):
        loss_type(name, **options)
