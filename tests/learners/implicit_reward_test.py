"""The implicit reward: its loss, one update in NumPy, what it learns, pairwise accuracy, its state on disk."""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from golden_cases import DOUBLE, TOLERANCE, close, make_test

from jentropy.learners.implicit_reward import implicit_reward, outcome_loss, pairwise_accuracy

NUM_TOKENS = 5
LENGTHS = np.array([3, 2, 0, 1, 3, 2])
MASK = (np.arange(4)[None, :] >= 1) & (np.arange(4)[None, :] <= LENGTHS[:, None])
TOKENS = np.random.default_rng(0).integers(0, NUM_TOKENS, MASK.shape).astype(np.int32)
ACCURACY = np.array([1.0, 0.0, 1.0, 0.5, 0.0, 1.0], np.float32)
GROUP = np.array([0, 0, 0, 1, 1, 2])


def initial(key, params=None):
    return {"w": jax.random.normal(key, (NUM_TOKENS,))}


def log_prob(params, tokens):
    """A distribution that does not depend on the tokens before."""
    return jax.nn.log_softmax(params["w"])[tokens]


def make(**options):
    return implicit_reward(**{"init": initial, "log_prob": log_prob, "optimizer": optax.sgd(0.5)} | options)


def rows(*, rewards=ACCURACY, **row_data):
    old = np.where(MASK, -1.0, np.nan).astype(np.float32)
    batch = toy.rollouts(MASK, rewards=rewards, group=GROUP, logp_old=old, row_data=row_data)
    return batch.replace(tokens=jnp.asarray(TOKENS))


@functools.cache
def jitted(function):
    return jax.jit(function)


def annotated(learner, state, **options):
    batch = rows(**options)
    return batch.replace(token_data=dict(learner.annotate(state, batch)))


def moved(learner):
    """A state whose model has left the reference."""
    state = learner.init(jax.random.key(0), None)
    return state._replace(params={"w": state.params["w"] + jnp.linspace(-1.0, 1.0, NUM_TOKENS)})


loss_of = jax.jit(outcome_loss)


def log_softmax(w):
    return np.asarray(w) - np.log(np.sum(np.exp(np.asarray(w))))


def test_annotation():
    learner = make()
    first = learner.init(jax.random.key(0), None)
    assert not learner.annotate(first, rows())["implicit_reward"].any()
    state = moved(learner)
    found = learner.annotate(state, rows())["implicit_reward"]
    ratio = log_softmax(state.params["w"]) - log_softmax(state.reference["w"])
    np.testing.assert_allclose(found, np.where(MASK, ratio[TOKENS], 0.0), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(make(num_microbatches=4).annotate(state, rows())["implicit_reward"], found)


def test_the_policy_as_reference():
    learner = make(reference="policy")
    state = learner.init(jax.random.key(0), None)
    assert state.reference == ()
    found = learner.annotate(state, rows())["implicit_reward"]
    wanted = np.where(MASK, log_softmax(state.params["w"])[TOKENS] + 1.0, 0.0)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_one_update_in_numpy():
    learner = make(beta=0.3)
    state = moved(learner)
    new, metrics = jitted(learner.update)(state, annotated(learner, state), jax.random.key(1))
    w = np.asarray(state.params["w"], np.float64)
    q = np.where(MASK, (log_softmax(w) - log_softmax(state.reference["w"]))[TOKENS], 0.0).sum(axis=1)
    used = MASK.any(axis=1)
    sigma = 1.0 / (1.0 + np.exp(-0.3 * q))
    loss = -(ACCURACY * np.log(sigma) + (1.0 - ACCURACY) * np.log(1.0 - sigma))[used].mean()
    gradient, probability = np.zeros(NUM_TOKENS), np.exp(log_softmax(w))
    for row in np.flatnonzero(used):
        for token in TOKENS[row][MASK[row]]:
            gradient += 0.3 * (sigma - ACCURACY)[row] * (np.eye(NUM_TOKENS)[token] - probability) / used.sum()
    np.testing.assert_allclose(new.params["w"], w - 0.5 * gradient, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["reward_model/prm_loss"], (loss, 1.0), rtol=1e-5)
    np.testing.assert_allclose(metrics["reward_model/grad_norm"], (float(np.linalg.norm(gradient)), 1.0), rtol=1e-5)
    np.testing.assert_array_equal(metrics["reward_model/skipped"], (0.0, 1.0))
    np.testing.assert_array_equal(metrics["error/accuracy is outside [0, 1]"], (0.0, 1.0))
    np.testing.assert_array_equal(new.reference["w"], state.reference["w"])


def test_update_before_annotation_is_the_same_update():
    learner = make()
    state = moved(learner)
    one = jitted(learner.update)(state, rows(), jax.random.key(1))
    two = jitted(learner.update)(state, annotated(learner, state), jax.random.key(1))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), one, two)


def test_it_learns_to_order_responses():
    learner = make(beta=1.0, num_epochs=10, num_minibatches=2)
    state = learner.init(jax.random.key(0), None)
    update, metrics = jitted(learner.update), {}
    for i in range(5):
        state, metrics = update(state, rows(), jax.random.key(i))
        if i == 0:  # all scores are 0, or rounding of it
            np.testing.assert_allclose(metrics["reward_model/dpo_acc"], (1.5, 3.0), atol=1e-6)
    np.testing.assert_allclose(metrics["reward_model/dpo_acc"], (2.5, 3.0), atol=1e-6)
    assert metrics["reward_model/prm_loss"][0] / metrics["reward_model/prm_loss"][1] < 0.6


def test_where_the_accuracy_is_taken_from():
    learner = make()
    state = moved(learner)
    wanted, _ = jitted(learner.update)(state, rows(), jax.random.key(1))
    columns = np.stack([np.full(6, np.nan, np.float32), ACCURACY], axis=1)
    for options, batch in (
        ({"reward_column": 1}, rows(rewards=columns)),
        ({"reward_column": None}, rows(rewards=columns, accuracy=ACCURACY)),
    ):
        found, _ = make(**options).update(state, batch, jax.random.key(1))
        np.testing.assert_allclose(found.params["w"], wanted.params["w"], rtol=1e-6)
    with pytest.raises(ValueError, match="reward_column must be below the 1 reward columns, got 1"):
        make(reward_column=1).update(state, rows(), jax.random.key(1))
    with pytest.raises(ValueError, match=r"the implicit reward needs row_data\['accuracy'\], got \[\]"):
        make(reward_column=None).update(state, rows(), jax.random.key(1))


def test_accuracies_outside_the_unit_interval_stop_a_run():
    bad = np.array([2.0, -0.5, 9.0, np.nan, 0.0, 1.0], np.float32)  # 9 is of a row without tokens
    state = moved(make())
    _, metrics = jitted(make().update)(state, rows(rewards=bad), jax.random.key(1))
    assert metrics["error/accuracy is outside [0, 1]"] == (3.0, 1.0)
    valid = np.array([False, False, True, False, True, True])
    _, metrics = jitted(make().update)(state, rows(rewards=bad, is_valid=valid), jax.random.key(1))
    assert metrics["error/accuracy is outside [0, 1]"] == (0.0, 1.0)
    assert metrics["reward_model/dpo_acc"] == (1.0, 2.0)


def test_micro_batches_change_nothing():
    state = moved(make())
    found, wanted = (
        jitted(make(num_minibatches=2, num_microbatches=num).update)(state, rows(), jax.random.key(1)) for num in (3, 1)
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), found, wanted)


def test_a_restored_state_goes_on_bit_for_bit():
    learner = make(optimizer=optax.adam(0.1), num_epochs=2)
    update = jitted(learner.update)
    state, _ = update(learner.init(jax.random.key(0), None), rows(), jax.random.key(1))
    leaves, structure = jax.tree.flatten(state)
    file = io.BytesIO()
    np.savez(file, *leaves)
    file.seek(0)
    stored = np.load(file)
    restored = jax.tree.unflatten(structure, [jnp.asarray(stored[name]) for name in stored.files])
    one, two = (update(s, rows(), jax.random.key(2))[0] for s in (state, restored))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert jax.tree.structure(one) == structure == jax.tree.structure(learner.init(jax.random.key(0), None))


def test_model_and_reference_are_two_buffers():
    """A state is donated as a whole."""
    learner = make()
    state = learner.init(jax.random.key(0), None)
    new, _ = jax.jit(learner.update, donate_argnums=0)(state, rows(), jax.random.key(1))
    assert np.isfinite(new.params["w"]).all() and np.isfinite(new.reference["w"]).all()


def test_settings_share_a_compilation():
    optimizer = optax.sgd(0.5)
    one, two = make(optimizer=optimizer), make(optimizer=optimizer, beta=0.5)
    assert one.update == two.update and hash(one.update) == hash(two.update) and one.annotate == two.annotate
    assert one.update != make(optimizer=optimizer, reward_column=None).update


@pytest.mark.parametrize(("logit", "label"), [(400.0, 0.0), (-400.0, 1.0)])
def test_the_gradient_lives_where_the_sigmoid_is_flat(logit, label):
    """The released code has a loss of 100 and a gradient of 0 here."""
    arguments = (np.zeros((1, 1)), np.ones((1, 1), bool), np.array([label]), jnp.asarray(0.05))
    function = jax.value_and_grad(lambda x: jnp.sum(loss_of(x, *arguments)))
    loss, gradient = function(jnp.full((1, 1), 20.0 * logit))
    np.testing.assert_allclose(loss, 400.0, rtol=1e-6)
    np.testing.assert_allclose(gradient, [[0.05 * np.sign(logit)]], rtol=1e-6)


def pairs(score, accuracy, group, used):
    """By definition: the mean over groups of the weighted share of pairs that are in order."""
    means = []
    for g in np.unique(group[used]):
        own = np.flatnonzero(used & (group == g))
        total = found = 0.0
        for i in own:
            for j in own:
                if accuracy[i] > accuracy[j]:
                    total += accuracy[i] - accuracy[j]
                    found += (accuracy[i] - accuracy[j]) * (0.5 + 0.5 * np.sign(score[i] - score[j]))
        means.append(found / total if total else 0.5)
    return np.sum(means), len(means)


@pytest.mark.parametrize("seed", range(5))
def test_pairwise_accuracy_against_a_loop(seed):
    rng = np.random.default_rng(seed)
    score, accuracy = (rng.integers(0, 4, 12).astype(np.float32) / 3 for _ in range(2))
    group, used = rng.integers(0, 4, 12).astype(np.int32), rng.random(12) < 0.8
    spoiled = np.where(used, score, np.nan).astype(np.float32), np.where(used, accuracy, np.nan).astype(np.float32)
    found = jitted(pairwise_accuracy)(*spoiled, group, used)
    np.testing.assert_allclose(found, pairs(score, accuracy, group, used), rtol=1e-5)


def test_pairwise_accuracy_by_hand():
    score, accuracy = np.array([3.0, 1.0, 2.0, 0.0], np.float32), np.array([1.0, 0.0, 0.0, 1.0], np.float32)
    everyone, one_group = np.ones(4, bool), np.zeros(4, np.int32)
    np.testing.assert_array_equal(jitted(pairwise_accuracy)(score, accuracy, one_group, everyone), (0.5, 1.0))
    single = np.arange(4, dtype=np.int32)
    np.testing.assert_array_equal(jitted(pairwise_accuracy)(score, accuracy, single, everyone), (2.0, 4.0))
    np.testing.assert_array_equal(jitted(pairwise_accuracy)(score, accuracy, single, ~everyone), (0.0, 0.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, r"beta must be finite and above 0, got 0\.0"),
        ({"reference": "sft"}, "reference must be initial or policy, got 'sft'"),
        ({"reward_column": -1}, "reward_column must be None or at least 0, got -1"),
        ({"num_epochs": 0}, "num_epochs must be a whole number of at least 1, got 0"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def check_prime(golden, precision):
    """`base_prime_*`: PRIME's loss, its gradient and accuracy, in which rows without tokens count; here they do not."""
    mask, tolerance = golden["response_mask"] > 0, TOLERANCE[precision]
    used, accuracy = mask.any(axis=1), np.asarray(golden["acc"], np.float64)
    beta, num_rows = jnp.asarray(float(golden["beta"])), len(mask)
    reference, weight = np.where(mask, golden["ref_logp"], np.nan), jnp.asarray(used / used.sum())

    def loss(x):
        return jnp.sum(weight * loss_of(x, reference, mask, accuracy, beta))

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(golden["prm_logp"]))
    own = (golden["ce_loss"] * num_rows - (~used).sum() * np.log(2.0)) / used.sum()
    close(value, own, tolerance)
    close(gradient, golden["ce_grad"] * mask * num_rows / used.sum(), tolerance)
    score = np.where(mask, golden["prm_logp"] - golden["ref_logp"], 0.0).sum(axis=1)
    group = (np.arange(num_rows) // int(golden["n_samples"])).astype(np.int32)
    total, count = jitted(pairwise_accuracy)(score, accuracy, group, used)
    np.testing.assert_allclose((total, count), pairs(score, accuracy, group, used), rtol=1e-12)
    if used.all():
        close(total / count, golden["dpo_acc"], tolerance)


FAMILIES = {"base_prime_*": (check_prime, DOUBLE)}

test_released_code = make_test(FAMILIES)
