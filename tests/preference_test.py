"""H-DPO: the loss against a NumPy loop and stored numbers, its optimum, and the choice of pairs."""

import fnmatch
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from golden_cases import DOUBLE, FILES, TOLERANCE, close, make_test

from jentropy.preference import Pairs, h_dpo, pair_weight, select_pairs

METHOD = h_dpo(alpha=0.8, beta=0.1)


def make_pairs(chosen_mask, rejected_mask, chosen_ref, rejected_ref, valid=None):
    rows = [
        toy.rollouts(mask, logp_old=jnp.zeros_like(ref), token_data={"ref_log_prob": ref})
        for mask, ref in ((chosen_mask, jnp.asarray(chosen_ref)), (rejected_mask, jnp.asarray(rejected_ref)))
    ]
    valid = np.ones(len(rows[0].row_id), bool) if valid is None else valid
    return Pairs(chosen=rows[0], rejected=rows[1], valid=jnp.asarray(valid))


@functools.cache
def _gradient(loss):
    return jax.jit(jax.value_and_grad(lambda scores, state, *args: loss(state, *scores, *args), has_aux=True))


def evaluate(method, chosen, rejected, pairs):
    """`(loss, gradients of both log-probabilities, metrics)`."""
    scores = (jnp.asarray(chosen), jnp.asarray(rejected))
    (value, metrics), gradient = _gradient(method.loss)(scores, method.init(), pairs, pair_weight(pairs))
    return jax.tree.map(np.asarray, (value, gradient, metrics))


def random_case(seed=0, num_pairs=5, widths=(6, 9)):
    """Log-probabilities and pairs of ragged responses, float32."""
    rng = np.random.default_rng(seed)
    masks = [np.arange(w)[None, :] < rng.integers(1, w, num_pairs)[:, None] for w in widths]
    log_probs, refs = (
        [-rng.exponential(size=m.shape).astype(np.float32) * np.where(m, 1.0, np.nan).astype(np.float32) for m in masks]
        for _ in range(2)
    )
    return log_probs, make_pairs(*masks, *refs), masks, refs


def log_sigmoid(x):
    return -np.logaddexp(0.0, -x)


def dpo(chosen, rejected, ref_chosen, ref_rejected, beta, label_smoothing=0.0):
    """The sigmoid loss of DPO, from the ratios to the reference."""
    logits = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return -(1.0 - label_smoothing) * log_sigmoid(logits) - label_smoothing * log_sigmoid(-logits)


def sums(arrays, masks):
    return [np.array([row[used].sum(dtype=np.float64) for row, used in zip(x, mask)]) for x, mask in zip(arrays, masks)]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_alpha_one_is_dpo(label_smoothing):
    log_probs, pairs, masks, refs = random_case()
    value, gradient, _ = evaluate(h_dpo(alpha=1.0, beta=0.3, label_smoothing=label_smoothing), *log_probs, pairs)
    expected = dpo(*sums(log_probs, masks), *sums(refs, masks), 0.3, label_smoothing)
    np.testing.assert_allclose(value, expected.mean(), rtol=1e-6)
    for grad, mask in zip(gradient, masks):
        assert np.all(grad[~mask] == 0.0) and np.all(grad[mask] != 0.0)


@pytest.mark.parametrize("alpha", [0.8, 1.2])
def test_a_loop_over_pairs(alpha):
    log_probs, pairs, masks, refs = random_case()
    value, gradient, metrics = evaluate(h_dpo(alpha=alpha, beta=0.3), *log_probs, pairs)
    (w, l), (rw, rl) = sums(log_probs, masks), sums(refs, masks)
    h = alpha * 0.3 * (w - l) - 0.3 * (rw - rl)
    np.testing.assert_allclose(value, -log_sigmoid(h).mean(), rtol=1e-6)
    slope = -alpha * 0.3 / (1.0 + np.exp(h)) / len(h)
    np.testing.assert_allclose(gradient[0], slope[:, None] * masks[0], rtol=1e-5)
    np.testing.assert_allclose(gradient[1], -slope[:, None] * masks[1], rtol=1e-5)
    expected = {
        "h_dpo/loss": -log_sigmoid(h),
        "h_dpo/length_difference": masks[0].sum(1) - masks[1].sum(1),
        "rewards/chosen": alpha * 0.3 * w - 0.3 * rw,
        "rewards/rejected": alpha * 0.3 * l - 0.3 * rl,
        "rewards/margins": h,
        "rewards/accuracies": h > 0.0,
        "logps/chosen": w,
        "logps/rejected": l,
    }
    assert set(metrics) == set(expected)
    for name, x in expected.items():
        np.testing.assert_allclose(metrics[name], (x.sum(), len(h)), rtol=2e-6, atol=2e-6, err_msg=name)


def test_by_hand():
    pairs = make_pairs([[False, True, True]], [[False, True, False]], [[0.0, -1.0, -2.0]], [[0.0, -2.0, 0.0]])
    value, gradient, metrics = evaluate(h_dpo(alpha=0.5, beta=2.0), [[9.0, -1.0, -1.0]], [[9.0, -3.0, 9.0]], pairs)
    np.testing.assert_allclose(value, np.log1p(np.exp(-3.0)), rtol=1e-6)  # h = 1 (-2 + 3) - 2 (-3 + 2) = 3
    np.testing.assert_allclose(gradient[0], [[0.0, -1 / (1 + np.exp(3.0)), -1 / (1 + np.exp(3.0))]], rtol=1e-6)
    assert metrics["rewards/chosen"] == (4.0, 1.0) and metrics["rewards/rejected"] == (1.0, 1.0)


def test_length_normalised():
    log_probs, pairs, masks, refs = random_case()
    value, _, metrics = evaluate(h_dpo(alpha=0.8, beta=2.0, length_normalised=True), *log_probs, pairs)
    lengths = [mask.sum(1) for mask in masks]
    (w, l), (rw, rl) = ([x / n for x, n in zip(sums(arrays, masks), lengths)] for arrays in (log_probs, refs))
    np.testing.assert_allclose(value, -log_sigmoid(1.6 * (w - l) - 2.0 * (rw - rl)).mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["h_dpo/length_difference"][0], (lengths[0] - lengths[1]).sum())


def test_an_alpha_other_than_one_sees_the_length():
    """Equal tokens, equal policies: twice as many of them in the chosen response are a margin unless α = 1."""
    mask = np.ones((1, 2), bool)
    pairs = make_pairs(mask, mask & [[True, False]], -np.ones((1, 2)), -np.ones((1, 2)))
    scores = (-np.ones((1, 2)),) * 2
    margin = {a: float(evaluate(h_dpo(alpha=a, beta=0.5), *scores, pairs)[2]["rewards/margins"][0]) for a in (0.8, 1)}
    assert margin[1] == 0.0 and margin[0.8] == pytest.approx(0.1)
    assert evaluate(METHOD, *scores, pairs)[2]["h_dpo/length_difference"] == (1.0, 1.0)


@pytest.mark.parametrize("alpha", [0.6, 1.0, 1.5])
def test_the_optimum_is_a_tempered_reference(alpha):
    """All pairs of five responses, preferred as Bradley and Terry say: no gradient at ref^(1/α) exp(r / (αβ))."""
    with jax.enable_x64():
        rng, beta = np.random.default_rng(3), 0.7
        ref, r = np.log(rng.dirichlet(np.ones(5))), rng.normal(size=5)
        first, second = (x.ravel() for x in np.indices((5, 5)))
        ones, method = np.ones((25, 1), bool), h_dpo(alpha=alpha, beta=beta)
        pairs = make_pairs(ones, ones, ref[first, None], ref[second, None])
        preferred = jnp.asarray(1.0 / (1.0 + np.exp(r[second] - r[first])))

        def loss(logits):
            log_prob = jax.nn.log_softmax(logits)[:, None]
            return method.loss(method.init(), log_prob[first], log_prob[second], pairs, preferred)[0]

        optimum = jnp.asarray(ref / alpha + r / (alpha * beta))
        np.testing.assert_allclose(jax.grad(loss)(optimum), 0.0, atol=1e-14)
        assert np.abs(jax.grad(loss)(jnp.asarray(ref))).max() > 1e-2


def test_extreme_log_probabilities():
    mask, zeros = np.ones((2, 1), bool), np.zeros((2, 1), np.float32)
    pairs = make_pairs(mask, mask, zeros, zeros)
    scores = (np.float32([[-1e4], [-1e30]]), np.float32([[0.0], [0.0]]))
    value, gradient, _ = evaluate(h_dpo(alpha=1.0, beta=0.5), *scores, pairs)
    np.testing.assert_allclose(value, 0.25e30, rtol=1e-6)
    np.testing.assert_array_equal(gradient[0], [[-0.25], [-0.25]])
    value, gradient, _ = evaluate(h_dpo(alpha=1.0, beta=0.5), *scores[::-1], pairs)
    assert value == 0.0 and np.all(gradient[0] == 0.0)


def test_pairs_that_are_not_valid_weigh_nothing():
    log_probs, _, masks, refs = random_case()
    valid = np.array([True, False, True, True, False])
    poisoned = [np.where(valid[:, None], x, np.nan) for x in log_probs]
    some = make_pairs(*masks, *(np.where(valid[:, None], x, np.nan) for x in refs), valid)
    rest = make_pairs(*(m[valid] for m in masks), *(x[valid] for x in refs))
    value, gradient, metrics = evaluate(METHOD, *poisoned, some)
    expected, expected_gradient, expected_metrics = evaluate(METHOD, *(x[valid] for x in log_probs), rest)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for ours, theirs in zip(gradient, expected_gradient):
        assert np.all(ours[~valid] == 0.0)
        np.testing.assert_allclose(ours[valid], theirs, rtol=1e-6)
    for name, x in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], x, rtol=1e-6)
    none = make_pairs(*masks, *refs, np.zeros(5, bool))
    value, gradient, metrics = evaluate(METHOD, *log_probs, none)
    assert value == 0.0 and not np.any(gradient[0]) and not np.any(gradient[1]) and metrics["h_dpo/loss"] == (0.0, 0.0)


def test_micro_batches_add_up():
    log_probs, pairs, _, _ = random_case()
    weight = pair_weight(pairs)
    whole, metrics = METHOD.loss(METHOD.init(), *map(jnp.asarray, log_probs), pairs, weight)
    parts = [
        METHOD.loss(METHOD.init(), *(jnp.asarray(x[rows]) for x in log_probs), part, weight[rows])
        for rows in (np.array([3, 0]), np.array([1, 2, 4]))
        for part in [jax.tree.map(lambda x, rows=rows: x[rows], pairs)]
    ]
    np.testing.assert_allclose(sum(part[0] for part in parts), whole, rtol=1e-6)
    for name, (total, count) in metrics.items():
        np.testing.assert_allclose(sum(part[1][name][0] for part in parts), total, rtol=1e-5)
        assert sum(part[1][name][1] for part in parts) == count


def toy_groups():
    """Group 0 has a tie for the best, 1 no loser, 2 one row, 3 none, 4 a row without tokens and one that is invalid."""
    group = np.array([0, 0, 0, 0, 1, 1, 2, 4, 4, 4, 4])
    reward = np.array([0.0, 1.0, 1.0, 0.5, 1.0, 1.0, 0.0, 9.0, 2.0, 3.0, np.nan])
    mask = np.ones((11, 3), bool)
    mask[7] = False
    row_id = np.array([5, 9, 4, 0, 1, 2, 3, 6, 7, 8, 10])
    row_data = {"is_valid": np.arange(11) != 10}
    return toy.rollouts(mask, group=group, row_id=row_id, row_data=row_data), jnp.asarray(reward)


@pytest.mark.parametrize("order", [np.arange(11), np.random.default_rng(0).permutation(11)])
def test_best_and_worst_of_each_group(order):
    batch, reward = jax.tree.map(lambda x: x[order], toy_groups())
    pairs, metrics = select_pairs(batch, reward, num_groups=6)
    np.testing.assert_array_equal(pairs.valid, [True, False, False, False, True, False])
    np.testing.assert_array_equal(pairs.chosen.row_id[pairs.valid], [4, 8])
    np.testing.assert_array_equal(pairs.rejected.row_id[pairs.valid], [5, 7])
    assert metrics["preference/groups_without_pair"] == (2.0, 4.0)
    assert metrics["error/a group is outside [0, num_groups)"] == (0.0, 1.0)


def test_a_group_out_of_range_is_an_error():
    batch, reward = toy_groups()
    _, metrics = select_pairs(batch, reward, num_groups=4)
    assert metrics["error/a group is outside [0, num_groups)"] == (2.0, 1.0)


def test_settings_share_one_program():
    assert h_dpo(alpha=0.9).loss == h_dpo(beta=1.0, label_smoothing=0.1).loss
    assert h_dpo().loss != h_dpo(length_normalised=True).loss
    log_probs, pairs, _, _ = random_case()
    args = (METHOD.init(), *map(jnp.asarray, log_probs), pairs, pair_weight(pairs))
    np.testing.assert_allclose(jax.jit(METHOD.loss)(*args)[0], METHOD.loss(*args)[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 0.0}, "alpha must be finite and above 0, got 0.0"),
        ({"alpha": float("nan")}, "alpha must be finite and above 0, got nan"),
        ({"beta": -0.1}, "beta must be finite and above 0, got -0.1"),
        ({"beta": float("inf")}, "beta must be finite and above 0, got inf"),
        ({"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        h_dpo(**settings)


def test_errors_of_the_data():
    batch, reward = toy_groups()
    with pytest.raises(ValueError, match="num_groups must be at least 1, got 0"):
        select_pairs(batch, reward, num_groups=0)
    pairs, _ = select_pairs(batch, reward, num_groups=5)
    zeros = jnp.zeros(pairs.chosen.loss_mask.shape)
    with pytest.raises(ValueError, match=r"needs token_data\['ref_log_prob'\] of the chosen rows, got \[\]"):
        METHOD.loss(METHOD.init(), zeros, zeros, pairs, pair_weight(pairs))


def check_h_dpo(golden, precision):
    """`base_hdpo_*`: sums over whole responses; gradients are of the mean over pairs."""
    names = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")
    chosen, rejected, ref_chosen, ref_rejected = (golden[name][:, None] for name in names)
    mask = np.ones(chosen.shape, bool)
    pairs = make_pairs(mask, mask, ref_chosen, ref_rejected)
    keys = [key.removeprefix("loss_") for key in golden if key.startswith("loss_a")]
    assert keys
    for key in keys:
        alpha, beta = (float(part[1:]) / 100.0 for part in key.split("_"))
        value, gradient, metrics = evaluate(h_dpo(alpha=alpha, beta=beta), chosen, rejected, pairs)
        close(value, golden[f"loss_{key}"].mean(), TOLERANCE[precision])
        close(gradient[0][:, 0], golden[f"gradw_{key}"], TOLERANCE[precision])
        close(gradient[1][:, 0], golden[f"gradl_{key}"], TOLERANCE[precision])
        h = golden[f"logits_{key}"]
        close(metrics["rewards/margins"][0] / np.abs(h).sum(), h.sum() / np.abs(h).sum(), TOLERANCE[precision])
        if alpha == 1.0:
            close(value, dpo(*(golden[name] for name in names), beta).mean(), TOLERANCE[precision])


FAMILIES = {"base_hdpo_*": (check_h_dpo, DOUBLE)}
test_released_code = make_test(FAMILIES)


def test_stored_alphas_are_hundredths():
    """The keys hold α and β in hundredths: they are those that the file names."""
    for name in fnmatch.filter(FILES, "base_hdpo_*"):
        golden = np.load(FILES[name])
        keys = {tuple(float(part[1:]) / 100.0 for part in k.split("_")[1:]) for k in golden if k.startswith("loss_a")}
        assert keys == {(a, b) for a in golden["alphas"] for b in golden["betas"]}
