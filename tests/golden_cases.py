"""Stored outputs of released code: where they are, and what the tests of all families share.

Cases are found by family of file names in `tests/golden` and in `$JENTROPY_GOLDEN`, so files that are dropped in there
are checked too. Hyper-parameters are read from the file; one that is absent has the default of its source. In float64
the agreement is 1e-12, in float32 2e-6. Where a stored output is a defect of its source, the test asserts our value in
its place. A test file names its families and ends with

    test_released_code = golden_cases.make_test(FAMILIES)
"""

import fnmatch
import functools
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import loss_and_gradient, rollouts, signals, update

from jentropy import normalisers, surrogates
from jentropy.mechanisms.clip_range import clip_range

TOLERANCE = {"f64": 1e-12, "f32": 2e-6}
FLOAT32_SCALAR = 1e-7
"""verl's standard deviation of a single row and TRL's Bessel factor are float32 numbers."""

FOLDERS = [Path(__file__).parent / "golden"] + [Path(p) for p in [os.environ.get("JENTROPY_GOLDEN")] if p]
FILES = {path.name: path for folder in FOLDERS for path in sorted(folder.glob("*.npz"))}
MODES = ("token_mean", "token_sum", "seq_mean_token_sum", "seq_mean_token_sum_norm", "seq_mean_token_mean")


def verl_sequence_mean(counted, batch):
    """`sequence_mean_token_mean` with verl's `n + 1e-8`."""
    length = jnp.sum(counted, axis=1, keepdims=True, dtype=batch.logp_old.dtype)
    return normalisers.sequence_mean_token_mean(counted, batch) * (length / (length + 1e-8))


def make_normaliser(mode, length):
    return {
        "token_mean": normalisers.token_mean,
        "token_sum": normalisers.token_sum,
        "seq_mean_token_sum": normalisers.sequence_mean_token_sum,
        "seq_mean_token_sum_norm": normalisers.fixed_length(length=length),
        "seq_mean_token_mean": verl_sequence_mean,
    }[mode]


def hyper_parameters(golden):
    stored = json.loads(str(golden["hparams"])) if "hparams" in golden else {}
    stored |= {k.removeprefix("hp_"): v.item() for k, v in golden.items() if k.startswith("hp_")}
    ratio = stored.get("clip_ratio", 0.2)
    defaults = {
        "clip_ratio_low": ratio,
        "clip_ratio_high": ratio,
        "clip_ratio_c": 3.0,
        "clip_cov_ratio": 2e-4,
        "clip_cov_lb": 1.0,
        "clip_cov_ub": 5.0,
        "kl_cov_ratio": 2e-4,
        "ppo_kl_coef": 1.0,
    }
    return defaults | {k: v for k, v in stored.items() if v is not None}


def clip_range_of(hp):
    return clip_range(epsilon_low=hp["clip_ratio_low"], epsilon_high=hp["clip_ratio_high"])


def close(ours, theirs, tolerance):
    np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, rtol=tolerance, atol=tolerance)


def whitened_as_in_verl(whitened, values, mask):
    """Our whitened values with verl's `N + 1e-8` in the mean and the variance: an affine map, from what was whitened.

    Where all values are equal ours are 0, and verl's are rounding noise over `sqrt(1e-8)`.
    """
    x, count = values[mask], mask.sum()
    assert count > 1
    mean = x.sum() / (count + 1e-8)
    variance = np.square(x - mean).sum() / (count + 1e-8) * count / (count - 1)
    ratio = np.sqrt((x.var(ddof=1) + 1e-8) / (variance + 1e-8))
    shift = (x.mean() - mean) / np.sqrt(variance + 1e-8)
    return np.where(mask, whitened * ratio + shift, 0.0)


def relative(ours, theirs, tolerance):
    scale = max(np.abs(theirs).max(), 1.0)
    close(ours / scale, theirs / scale, tolerance)


class Case:
    """The inputs of a policy loss in one precision."""

    def __init__(self, golden, precision):
        self.golden, self.precision, self.hp = golden, precision, hyper_parameters(golden)
        self.dtype = np.float64 if precision == "f64" else np.float32
        self.mask = golden["response_mask"] > 0
        batch = rollouts(self.mask, logp_old=golden["old_log_prob"].astype(self.dtype))
        self.signals = signals(batch, log_prob=golden["log_prob"].astype(self.dtype))
        self.advantage = jnp.asarray(golden["advantages"], self.dtype)

    def plan(self, mechanism):
        return update(mechanism, self.signals, self.advantage)

    def normaliser(self, mode):
        return make_normaliser(mode, self.hp.get("loss_scale_factor", self.mask.shape[1]))

    def evaluate(self, plan, mode, *, surrogate=surrogates.ratio, terms=None):
        return loss_and_gradient(plan, self.signals, surrogate=surrogate, normaliser=self.normaliser(mode), terms=terms)

    def check(self, value, gradient, key, scale=1.0):
        """Compares with `loss<key>` and `grad<key>`; a NaN there, from an empty mask, is 0 here."""
        loss, grad = (self.golden.get(f"{name}{key}") for name in ("loss", "grad"))
        if np.isnan(loss):
            assert not self.mask.any()
            loss, grad = 0.0, np.zeros(self.mask.shape)
        close(value * scale, loss, TOLERANCE[self.precision])
        if grad is not None:
            close(gradient * scale, grad, TOLERANCE[self.precision])

    def modes(self):
        return [m for m in MODES if f"loss_{m}_{self.precision}" in self.golden]

    def check_mean(self, metrics, name, stored, suffix):
        """Compares a metric with verl's masked mean, which divides by `N + 1e-8`."""
        key = f"metric_{stored}{suffix}"
        if key in self.golden:
            total, count = (float(x) for x in metrics[name])
            assert count == self.mask.sum()
            close(total / (count + 1e-8), self.golden[key], TOLERANCE[self.precision])


@functools.cache
def _advantage(function):
    return jax.jit(lambda *args: function(*args)[0])


def estimate(estimator, rewards, group, mask):
    batch = rollouts(mask, rewards=np.asarray(rewards, np.float64), group=np.unique(group, return_inverse=True)[1])
    if np.isnan(rewards).any():
        batch = batch.replace(rewards=jnp.nan_to_num(batch.rewards))
        batch = batch.replace(
            row_data={"is_valid": jnp.asarray(~np.isnan(np.reshape(rewards, (len(mask), -1))).all(1))}
        )
    return np.asarray(_advantage(estimator.estimate)(batch, estimator.init()))


def check_group_rows(ours, theirs, group, tolerance=1e-12):
    """Rows of their own group at 1e-7, the others at `tolerance`; relative to the largest advantage."""
    _, inverse, counts = np.unique(group, return_inverse=True, return_counts=True)
    single = counts[inverse] == 1
    scale = max(np.abs(theirs).max(), 1.0)
    close(ours[~single] / scale, theirs[~single] / scale, tolerance)
    close(ours[single] / scale, theirs[single] / scale, max(tolerance, FLOAT32_SCALAR))


DOUBLE, BOTH = ("f64",), ("f64", "f32")
"""Precisions in which a family is checked."""


def make_test(families):
    """A parametrised test of `{pattern of file names: (check(golden, precision), precisions)}`.

    A pattern that matches no file is an error.
    """
    cases = []
    for pattern, (check, precisions) in families.items():
        names = sorted(fnmatch.filter(FILES, pattern))
        assert names, f"no stored output is named {pattern}"
        cases += [(name, check, precision) for name in names for precision in precisions]
    ids = [f"{name.removesuffix('.npz')}-{precision}" for name, _, precision in cases]

    @pytest.mark.parametrize(("name", "check", "precision"), cases, ids=ids)
    def test_released_code(name, check, precision):
        golden = dict(np.load(FILES[name]))
        with jax.enable_x64(precision == "f64"):
            check(golden, precision)

    return test_released_code
