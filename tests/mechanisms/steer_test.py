"""STEER: the weights against a loop in NumPy, their bounds, neutral settings, released code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from golden_cases import BOTH, TOLERANCE, Case, close, make_test

from jentropy import surrogates
from jentropy.mechanisms.clip_range import clip_range
from jentropy.mechanisms.steer import steer

MAPPINGS, MODES = ("linear", "exponential"), ("symmetric", "asymmetric")


def expected(signals, advantage, *, weight_min=0.8, weight_max=1.2, mapping="linear", mode="symmetric"):
    """The weights, one token after the other, in float64."""
    mask = np.asarray(signals.batch.loss_mask)
    change = {}
    arrays = signals.scores["log_prob"], signals.batch.logp_old, signals.scores["entropy"], advantage
    for i, t in np.argwhere(mask):
        log_prob, old, entropy, a = (float(x[i, t]) for x in arrays)
        p = np.exp(log_prob)
        omega = a / np.exp(old) * p * (1.0 - p) * (log_prob + entropy)
        change[i, t] = abs(omega) if mode == "symmetric" else omega
    low, high = min(change.values()), max(change.values())
    weight = np.zeros(mask.shape)
    for token, omega in change.items():
        if mapping == "linear":
            weight[token] = weight_max - (weight_max - weight_min) * (omega - low) / (high - low)
        else:
            rate = -np.log(weight_min) / max(max(map(abs, change.values())), 0.02)
            weight[token] = np.clip(np.exp(-rate * omega), weight_min, 1.0 if mode == "symmetric" else weight_max)
    return weight


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mapping", MAPPINGS)
def test_against_a_loop(mapping, mode):
    _, signals, advantage = toy.random_batch()
    options = {"weight_min": 0.6, "weight_max": 1.3, "mapping": mapping, "mode": mode}
    plan = toy.update(steer(**options), signals, advantage)
    wanted = expected(signals, advantage, **options)
    np.testing.assert_allclose(plan.pg_weight, wanted, rtol=1e-5)
    total, count = plan.metrics["steer/weight_mean"]
    assert total == pytest.approx(wanted.sum(), rel=1e-5) and count == int(signals.batch.loss_mask.sum())


def one_row(advantage, probability, entropy):
    """A row of tokens with these probabilities under both policies."""
    log_prob = np.log([probability])
    batch = toy.rollouts(np.ones(log_prob.shape, bool), logp_old=log_prob)
    return toy.signals(batch, log_prob=log_prob, entropy=np.array([entropy])), jnp.asarray([advantage])


def test_by_hand():
    # p = 1/2: A (1 - p)(log p + H) with H = 1 is A/2 (1 - log 2); so Ω is proportional to |A|.
    signals, advantage = one_row([1.0, -3.0, 2.0, -1.0], [0.5] * 4, [1.0] * 4)
    np.testing.assert_allclose(toy.update(steer(), signals, advantage).pg_weight, [[1.2, 0.8, 1.0, 1.2]], rtol=1e-6)
    plan = toy.update(steer(mode="asymmetric"), signals, advantage)
    share = (np.array([1.0, -3.0, 2.0, -1.0]) + 3.0) / 5.0
    np.testing.assert_allclose(plan.pg_weight, [1.2 - 0.4 * share], rtol=1e-6)


def test_small_changes_are_hardly_damped():
    signals, advantage = one_row([1e-4, -2e-4], [0.5, 0.5], [1.0, 1.0])
    weight = toy.update(steer(mapping="exponential"), signals, advantage).pg_weight
    omega = np.array([1e-4, 2e-4]) / 2.0 * (1.0 - np.log(2.0))
    np.testing.assert_allclose(weight, [0.8 ** (omega / 0.02)], rtol=1e-6)


@pytest.mark.parametrize(("mapping", "weight"), [("linear", 1.05), ("exponential", 0.7)])
def test_equal_changes(mapping, weight):
    signals, advantage = one_row([2.0, -2.0], [0.5, 0.5], [1.0, 1.0])
    plan = toy.update(steer(weight_min=0.7, weight_max=1.4, mapping=mapping), signals, advantage)
    np.testing.assert_allclose(plan.pg_weight, [[weight, weight]], rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mapping", MAPPINGS)
def test_weights_1_are_the_identity(mapping, mode):
    _, signals, advantage = toy.random_batch()
    plan = toy.update(steer(weight_min=1.0, weight_max=1.0, mapping=mapping, mode=mode), signals, advantage)
    np.testing.assert_array_equal(plan.pg_weight, signals.batch.loss_mask)


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_extreme_probabilities_give_finite_weights(mapping):
    signals, advantage = one_row([1.0, -1.0, 1.0], [1.0, 1e-30, 0.5], [0.0, 0.0, 2.0])
    weight = np.asarray(toy.update(steer(mapping=mapping), signals, advantage).pg_weight)
    assert np.all((weight >= np.float32(0.8)) & (weight <= np.float32(1.2)))


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_empty_batch_and_garbage(mapping):
    batch, clean, advantage = toy.random_batch()
    empty = clean.replace(batch=batch.replace(loss_mask=jnp.zeros_like(batch.loss_mask)))
    plan = toy.update(steer(mapping=mapping), empty, advantage)
    assert not np.any(plan.pg_weight) and all(np.isfinite(total) for total, _ in plan.metrics.values())
    dirty = toy.random_batch(fill=np.nan)[1:]
    plans = toy.update(steer(mapping=mapping), clean, advantage), toy.update(steer(mapping=mapping), *dirty)
    jax.tree.map(np.testing.assert_array_equal, *plans)


def test_weights_of_others_are_kept():
    _, signals, advantage = toy.random_batch()
    start = toy.update(clip_range(), signals, advantage)
    plan = toy.update(steer(), signals, advantage, plan=start.replace(pg_weight=start.pg_weight * 0.5))
    np.testing.assert_allclose(plan.pg_weight, toy.update(steer(), signals, advantage).pg_weight / 2.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_min": 0.0}, r"weight_min must be in \(0, 1\], got 0\.0"),
        ({"weight_max": 0.9}, r"weight_max must be finite and at least 1, got 0\.9"),
        ({"mapping": "log"}, "mapping must be linear or exponential, got 'log'"),
        ({"mode": "abs"}, "mode must be symmetric or asymmetric, got 'abs'"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        steer(**options)


def check_released_code(golden, precision):
    """`entropy_steer*`: the authors' weights and loss, ε .2 and .28, c 10; their weights are float32 numbers."""
    case = Case({"hp_clip_ratio_high": np.float64(0.28), "hp_clip_ratio_c": np.float64(10.0), **golden}, precision)
    case.signals = case.signals.replace(
        scores={**case.signals.scores, "entropy": jnp.asarray(golden["entropies"], case.dtype)}
    )
    clip = clip_range(epsilon_low=case.hp["clip_ratio_low"], epsilon_high=case.hp["clip_ratio_high"])
    surrogate = surrogates.dual_clip(clip_ratio_c=case.hp["clip_ratio_c"])
    num_tokens = case.mask.sum()
    scale = num_tokens / (num_tokens + 1e-8)
    for key, mapping in (("linear", "linear"), ("exp", "exponential")):
        start = case.plan(clip)
        plan = toy.update(steer(mapping=mapping), case.signals, case.advantage, plan=start)
        value, gradient, _ = case.evaluate(plan, "token_mean", surrogate=surrogate)
        close(plan.pg_weight, np.where(case.mask, golden[f"weights_{key}"], 0.0), TOLERANCE["f32"])
        close(value * scale, golden[f"loss_{key}"], TOLERANCE["f32"])
        close(gradient * scale, golden[f"grad_{key}"], TOLERANCE["f32"])


test_released_code = make_test({"entropy_steer*": (check_released_code, BOTH)})
