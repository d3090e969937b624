"""One step of H-DPO on a tiny policy: against a plain re-implementation, cut into micro-batches, and skipped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jentropy.data.preferences import PairBatch
from jentropy.policy.transformer import TransformerConfig, transformer
from jentropy.preference import h_dpo
from jentropy.train.metrics import divide
from jentropy.train.optimizer import AdamW
from jentropy.train.preference_stage import Prefer
from jentropy.train.preference_step import (
    make_preference_step,
    new_preference_stage,
    pair_rollouts,
    preference_spec,
)
from jentropy.train.sharding import MeshShape, make_mesh

POLICY = transformer(
    TransformerConfig(vocab_size=16, width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_size=8, mlp_width=16)
)
OPTIMIZER = AdamW(learning_rate=1e-2)
PAIRS, WIDTH, PROMPT = 4, 9, 4
ALPHA, BETA, EPSILON = 0.8, 0.7, 0.1


def batch(seed=0):
    """Ragged responses of 1 to 5 tokens behind prompts of 4; what follows them is any token."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 16, (2 * PAIRS, WIDTH)).astype(np.int32)
    tokens[1::2, :PROMPT] = tokens[::2, :PROMPT]
    length = rng.integers(1, WIDTH - PROMPT + 1, 2 * PAIRS)
    column = np.arange(WIDTH)[None, :]
    mask = (column >= PROMPT) & (column < PROMPT + length[:, None])
    return PairBatch(tokens, mask, np.full(2 * PAIRS, PROMPT, np.int32), np.arange(PAIRS))


@functools.cache
def _params():
    return jax.device_get(jax.jit(jax.vmap(POLICY.init))(jnp.stack([jax.random.key(0), jax.random.key(1)])))


def params(seed):
    """Of two policies, 0 and 1, on the host."""
    return jax.tree.map(lambda x: x[seed], _params())


def stage(method=None, **options):
    method = method or h_dpo(alpha=ALPHA, beta=BETA, label_smoothing=EPSILON)
    return Prefer(**{"steps": 1, "loss": method, "mixture": {}, "batch_size": PAIRS, "optimizer": OPTIMIZER, **options})


def state(method=None):
    """A policy that is no longer its reference."""
    start = jax.tree.map(jnp.asarray, params(0))
    fresh = new_preference_stage(start, jnp.int32(7), jax.random.key(3), stage(method))
    return fresh.replace(frozen={"reference": jax.tree.map(jnp.asarray, params(1))})


def step(num=1):
    spec = preference_spec(stage(num_microbatches=num), POLICY)
    return make_preference_step(spec, make_mesh(MeshShape()))


def run(num=1, rows=None, **options):
    """The state after a step and its metrics."""
    after, metrics = step(num)(state(**options), pair_rollouts(batch()) if rows is None else rows)
    return after, metrics


def plain_scores(p, tokens):
    """log π of each token and the entropy there, without a fused head."""
    logits = POLICY.hidden(p, tokens)[:, :-1] @ POLICY.unembed(p).T
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    chosen = jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)[..., 0]
    return chosen, -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)


def plain_loss(p, reference, tokens, mask, weight):
    scores = plain_scores(p, tokens)
    mask = mask[:, 1:].astype(jnp.float32)
    policy, ref = (jnp.sum(x * mask, axis=1) for x in (scores[0], plain_scores(reference, tokens)[0]))
    h = ALPHA * BETA * (policy[::2] - policy[1::2]) - BETA * (ref[::2] - ref[1::2])
    loss = -(1 - EPSILON) * jnp.log(jax.nn.sigmoid(h)) - EPSILON * jnp.log(1 - jax.nn.sigmoid(h))
    return jnp.sum(weight * loss), scores


@functools.cache
def _plain():
    return jax.jit(jax.value_and_grad(plain_loss, has_aux=True))


def plain(weight, p=0, reference=1):
    """(loss, gradient, log π and entropy of tokens 1..) of the batch."""
    pairs = batch()
    args = params(p), params(reference), pairs.tokens, pairs.mask, np.asarray(weight, np.float32)
    (value, scores), gradient = jax.device_get(_plain()(*args))
    return value, gradient, scores


def global_norm(gradient):
    return np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(gradient)))


def clipped(gradient):
    """A gradient of a norm of at most 1, times 1 - b1: Adam's first moment after one update."""
    return jax.tree.map(lambda g: 0.1 * g * min(1.0, 1.0 / global_norm(gradient)), gradient)


def close(found, expected, rtol=1e-5, atol=1e-6):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def gradients(after):
    """The first moment after one update: the clipped gradient, times 1 - b1."""
    return after.opt_state[1].mu


@pytest.fixture(scope="module")
def whole():
    return jax.device_get(run())


def test_a_step_is_that_of_a_plain_loss(whole):
    after, metrics = whole
    loss, gradient, _ = plain([0.25] * 4)
    np.testing.assert_allclose(metrics["actor/loss"][0], loss, rtol=2e-6)
    np.testing.assert_allclose(metrics["actor/grad_norm"][0], global_norm(gradient), rtol=1e-5)
    close(gradients(after), clipped(gradient), rtol=2e-4, atol=1e-6)
    moment = after.opt_state[1]
    for new, old, m, n in zip(*map(jax.tree.leaves, (after.params, params(0), moment.mu, moment.nu)), strict=True):
        update = -OPTIMIZER.learning_rate * (m / 0.1) / (np.sqrt(n / 0.02) + 1e-8)
        np.testing.assert_allclose(new, old + update, rtol=1e-5, atol=1e-6)
    assert int(after.step) == 8
    assert after.mechanism_state == pytest.approx((ALPHA, BETA, EPSILON))


def test_the_metrics_say_what_the_batch_was(whole):
    metrics, pairs = divide(whole[1]), batch()
    (log_prob, entropy), (reference, _) = (plain([0.25] * 4, p)[2] for p in (0, 1))
    mask, length = pairs.mask[:, 1:], pairs.mask.sum(axis=1)
    policy, ref = (np.where(mask, x, 0.0).sum(axis=1) for x in (log_prob, reference))
    reward = ALPHA * BETA * policy - BETA * ref
    expected = {
        "actor/entropy": entropy[mask].mean(),
        "entropy/sequence_mean": (np.where(mask, entropy, 0.0).sum(axis=1) / length).mean(),
        "response_length/mean": length.mean(),
        "h_dpo/loss": metrics["actor/loss"],
        "h_dpo/length_difference": (length[::2] - length[1::2]).mean(),
        "rewards/chosen": reward[::2].mean(),
        "rewards/rejected": reward[1::2].mean(),
        "rewards/margins": (reward[::2] - reward[1::2]).mean(),
        "rewards/accuracies": (reward[::2] > reward[1::2]).mean(),
        "logps/chosen": policy[::2].mean(),
        "logps/rejected": policy[1::2].mean(),
        "preference/groups_without_pair": 0.0,
        "error/a group is outside [0, num_groups)": 0.0,
        "update/skipped": 0.0,
    }
    assert metrics.keys() - expected.keys() == {"actor/loss", "actor/grad_norm"}
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_micro_batches_change_nothing(whole):
    after, metrics = jax.device_get(run(2))
    close(gradients(after), gradients(whole[0]))
    assert metrics.keys() == whole[1].keys()
    close(metrics, whole[1])


def test_the_order_of_rows_and_what_is_masked_change_nothing(whole):
    rows = pair_rollouts(batch())
    order = np.random.default_rng(5).permutation(2 * PAIRS)
    rows = rows.replace(logp_old=np.where(rows.loss_mask, 0.0, np.nan).astype(np.float32))
    mixed = jax.tree.map(lambda x: x[order], rows)
    after, metrics = jax.device_get(run(rows=mixed))
    close(gradients(after), gradients(whole[0]))
    close(metrics, whole[1])


def test_a_pair_without_a_loser_weighs_nothing(whole):
    rows = pair_rollouts(batch())
    rewards = rows.rewards.copy()
    rewards[2:4] = 1.0
    after, metrics = jax.device_get(run(rows=rows.replace(rewards=rewards)))
    assert divide(metrics)["preference/groups_without_pair"] == 1 / PAIRS
    loss, gradient, _ = plain([1 / 3, 0.0, 1 / 3, 1 / 3])
    np.testing.assert_allclose(divide(metrics)["actor/loss"], loss, rtol=2e-6)
    close(gradients(after), clipped(gradient), rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("why", ["no pair", "a reference that is not finite"])
def test_an_update_that_cannot_be_made_is_skipped(why):
    before, rows = state(), pair_rollouts(batch())
    if why == "no pair":
        rows = rows.replace(rewards=np.ones_like(rows.rewards))
    else:
        before = before.replace(frozen=jax.tree.map(lambda x: x * np.float32(np.nan), before.frozen))
    kept = jax.device_get((before.params, before.opt_state))
    after, metrics = jax.device_get(step()(before, rows))
    for a, b in zip(jax.tree.leaves((after.params, after.opt_state)), jax.tree.leaves(kept), strict=True):
        np.testing.assert_array_equal(a, b)
    assert int(after.step) == 8
    found = divide(metrics)
    assert found["update/skipped"] == 1.0 and "actor/loss" not in found


def test_numbers_share_one_compiled_step():
    spec = preference_spec(stage(), POLICY)
    assert spec == preference_spec(stage(h_dpo(beta=1.0), optimizer=AdamW(learning_rate=1.0)), POLICY)
    assert spec != preference_spec(stage(h_dpo(length_normalised=True)), POLICY)
    gradient = [gradients(run(method=h_dpo(alpha=alpha, beta=BETA))[0]) for alpha in (0.8, 1.2)]
    leaves = zip(*map(jax.tree.leaves, jax.device_get(gradient)), strict=True)
    assert any((a != b).any() for a, b in leaves), "and the numbers are those of the state"


def test_a_new_stage_begins_as_its_reference():
    start = jax.tree.map(jnp.asarray, params(0))
    begun = new_preference_stage(start, jnp.int32(0), jax.random.key(0), stage(h_dpo(alpha=1.0, beta=0.5)))
    found = divide(step()(begun, pair_rollouts(batch()))[1])
    np.testing.assert_allclose(found["actor/loss"], np.log(2.0), rtol=1e-6)
    np.testing.assert_allclose(found["rewards/margins"], 0.0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_microbatches": 3}, "num_microbatches must be a divisor of batch_size = 4 pairs, got 3"),
    ],
)
def test_bad_numbers_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        stage(**change)
