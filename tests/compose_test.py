"""The algebra of mechanisms: chains, stateless mechanisms, penalties on batch statistics, blocks."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from jentropy import stats
from jentropy.base import ENTROPY, LOG_PROB, Array, Mechanism, Output, hyper, initial_plan
from jentropy.compose import blockwise, blockwise_normaliser, chain, penalty, quantity, stateless, walk
from jentropy.mechanisms.clip_cov import clip_cov
from jentropy.mechanisms.clip_range import clip_range
from jentropy.mechanisms.entropy_bonus import entropy_bonus
from jentropy.mechanisms.kl_cov import kl_cov
from jentropy.normalisers import sequence_mean_token_mean, token_mean, token_sum
from jentropy.train.scoring import to_micro

ROWS, COLUMNS, BLOCK = 6, 10, 2


class CounterState(NamedTuple):
    scale: Array
    calls: Array


def _count(plan, state, signals, key):
    """Multiplies the advantage, adds noise of its own key to `pg_weight`, counts its calls."""
    noise = jax.random.uniform(key, plan.advantage.shape, plan.advantage.dtype)
    plan = plan.replace(advantage=plan.advantage * state.scale, pg_weight=plan.pg_weight + noise)
    calls = state.calls.astype(state.scale.dtype)
    return plan.report(counter__calls=(calls, jnp.ones_like(calls))), state._replace(calls=state.calls + 1)


def counter(scale: float) -> Mechanism:
    return Mechanism(lambda: CounterState(hyper(scale), jnp.int32(0)), _count)


def _add_one(plan, signals, key):
    return plan.replace(advantage=plan.advantage + 1.0)


def _other_entropy(quantities, plan, batch):
    return 2.0 * quantities["entropy"]


def _run(mechanism, signals, advantage, key=0):
    plan = initial_plan(signals.batch, advantage)
    return jax.jit(mechanism.update)(plan, mechanism.init(), signals, jax.random.key(key))


# chain


def test_chain_applies_in_order_with_its_own_keys_and_named_states():
    _, signals, advantage = toy.random_batch(shape=(ROWS, COLUMNS))
    mechanism = chain(first=counter(2.0), add=stateless(_add_one), second=counter(3.0))
    plan, state = _run(mechanism, signals, advantage, key=7)

    expected = (jnp.where(signals.batch.loss_mask, advantage, 0.0) * 2.0 + 1.0) * 3.0
    np.testing.assert_allclose(plan.advantage, expected, rtol=1e-6)
    noise = [
        jax.random.uniform(jax.random.fold_in(jax.random.key(7), i), advantage.shape, advantage.dtype) for i in (0, 2)
    ]
    np.testing.assert_allclose(plan.pg_weight, signals.batch.loss_mask.astype(jnp.float32) + noise[0] + noise[1])
    assert set(state) == {"first", "add", "second"}
    assert [int(state[name].calls) for name in ("first", "second")] == [1, 1]
    assert [float(state[name].scale) for name in ("first", "second")] == [2.0, 3.0]


def test_order_matters():
    _, signals, advantage = toy.random_batch()
    one, _ = _run(chain(add=stateless(_add_one), scale=counter(2.0)), signals, advantage)
    other, _ = _run(chain(scale=counter(2.0), add=stateless(_add_one)), signals, advantage)
    np.testing.assert_allclose(one.advantage, other.advantage + 1.0, rtol=1e-6)


def test_empty_chain_is_the_identity():
    _, signals, advantage = toy.random_batch()
    plan, state = _run(chain(), signals, advantage)
    assert state == {}
    chex.assert_trees_all_equal(plan, initial_plan(signals.batch, advantage))


def test_chain_merges_outputs_terms_and_min_updates():
    late = clip_cov()._replace(min_updates=2)
    mechanism = chain(bonus=entropy_bonus(), late=late, again=entropy_bonus(entropy_coef=0.1), kl=kl_cov())
    assert mechanism.outputs == (ENTROPY,)
    assert set(mechanism.terms) == {"entropy", "abs_log_ratio"}
    assert mechanism.min_updates == 2
    assert chain().min_updates == 1


def test_coefficients_of_one_term_add_up():
    _, signals, advantage = toy.random_batch()
    both, _ = _run(chain(one=entropy_bonus(entropy_coef=0.1), two=entropy_bonus(entropy_coef=0.2)), signals, advantage)
    alone, _ = _run(entropy_bonus(entropy_coef=0.3), signals, advantage)
    np.testing.assert_allclose(both.terms["entropy"], alone.terms["entropy"], rtol=1e-6)


def test_two_definitions_of_one_term_are_refused():
    other = stateless(_add_one, terms={"entropy": _other_entropy})
    with pytest.raises(ValueError, match="'other' defines the term 'entropy' differently"):
        chain(bonus=entropy_bonus(), other=other)


def test_chains_compare_by_names_and_updates_not_by_numbers():
    one = chain(clip=clip_range(), bonus=entropy_bonus(entropy_coef=0.1))
    two = chain(clip=clip_range(epsilon_low=0.1), bonus=entropy_bonus())
    assert one.update == two.update and hash(one.update) == hash(two.update)
    assert one.update != chain(bonus=entropy_bonus(), clip=clip_range()).update
    assert one.update != chain(a=clip_range(), b=entropy_bonus()).update


def test_chains_nest():
    _, signals, advantage = toy.random_batch()
    inner = chain(clip=clip_range(), bonus=entropy_bonus(entropy_coef=0.1))
    nested, state = _run(chain(inner=inner, scale=counter(2.0)), signals, advantage)
    flat, _ = _run(chain(clip=clip_range(), bonus=entropy_bonus(entropy_coef=0.1)), signals, advantage)
    assert set(state) == {"inner", "scale"} and set(state["inner"]) == {"clip", "bonus"}
    chex.assert_trees_all_equal(nested.terms, flat.terms)
    np.testing.assert_array_equal(nested.ratio_high, flat.ratio_high)


# stateless, quantity


def test_stateless_has_an_empty_state_and_compares_by_its_function():
    mechanism = stateless(_add_one, outputs=(ENTROPY,))
    assert mechanism.init() == () and mechanism.outputs == (ENTROPY,) and mechanism.terms == {}
    assert mechanism.update == stateless(_add_one).update


def test_quantities_of_one_name_are_equal():
    assert quantity("entropy") == quantity("entropy") and hash(quantity("entropy")) == hash(quantity("entropy"))
    assert quantity("entropy") != quantity("log_prob")
    value = jnp.ones((2, 3))
    assert quantity("entropy")({"entropy": value}, None, None) is value


# penalty


def _entropy_target(scores, signals):
    """(mean entropy - 1/2)²: not a sum over tokens."""
    mean = stats.masked_mean(scores["entropy"], signals.batch.loss_mask)
    return jnp.square(mean - 0.5)


_TARGET = penalty(_entropy_target, outputs=(ENTROPY,))


def _correlation(scores, signals):
    """A formula of two quantities at once."""
    return stats.masked_covariance(scores["entropy"], scores["log_prob"], signals.batch.loss_mask)


def _gradient_of_terms(plan, terms, quantities, batch, num):
    """d (Σ_f Σ_t c f_t) / d quantities, summed over `num` micro-batches as the loss is."""

    def loss(q, part_plan, part_batch):
        return sum(jnp.sum(part_plan.terms[name] * terms[name](q, part_plan, part_batch)) for name in sorted(terms))

    pieces = to_micro((quantities, plan.replace(metrics={}), batch), num)
    gradients = [jax.grad(loss)(*jax.tree.map(lambda x, i=i: x[i], pieces)) for i in range(num)]
    return jax.tree.map(
        lambda *x: np.stack(x, axis=1).reshape((-1, *x[0].shape[1:])),
        *gradients,
    )


@pytest.mark.parametrize("formula, outputs", [(_entropy_target, (ENTROPY,)), (_correlation, (ENTROPY, LOG_PROB))])
def test_penalty_has_the_gradient_of_its_formula(formula, outputs):
    with jax.enable_x64(True):
        _, signals, advantage = jax.tree.map(
            lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x,
            toy.random_batch(shape=(ROWS, COLUMNS)),
        )
        mechanism = penalty(formula, outputs=outputs)
        plan, _ = _run(mechanism, signals, advantage)
        wanted = jax.grad(formula)(dict(signals.scores), signals)
        for num in (1, 2, 3, 6):
            found = _gradient_of_terms(plan, mechanism.terms, dict(signals.scores), signals.batch, num)
            for name in ("entropy", "log_prob"):
                np.testing.assert_allclose(found[name], wanted[name], rtol=1e-12, atol=1e-15)
        value, count = plan.metrics["actor/penalty"]
        np.testing.assert_allclose(value, formula(signals.scores, signals), rtol=1e-12)
        assert count == 1.0


def test_penalty_adds_to_a_term_that_is_there():
    _, signals, advantage = toy.random_batch()
    bonus = entropy_bonus(entropy_coef=0.1)
    both, _ = _run(chain(bonus=bonus, target=_TARGET), signals, advantage)
    parts = [_run(m, signals, advantage)[0] for m in (bonus, _TARGET)]
    np.testing.assert_allclose(both.terms["entropy"], sum(p.terms["entropy"] for p in parts), rtol=1e-6)


def test_penalties_of_one_formula_share_a_compilation():
    one, other = (penalty(_entropy_target, outputs=(output,)) for output in (ENTROPY, Output("entropy")))
    assert one.update == other.update


# blocks


def _reference_blocks(mechanism, signals, advantage, key):
    """The mechanism on each block by a Python loop, with the state passed on."""
    state, plans, update = mechanism.init(), [], jax.jit(mechanism.update)
    for i in range(ROWS // BLOCK):
        batch, scores, part = jax.tree.map(
            lambda x, i=i: x[i * BLOCK : (i + 1) * BLOCK], (signals.batch, dict(signals.scores), advantage)
        )
        block = signals.replace(batch=batch, scores=scores)
        plan, state = update(initial_plan(batch, part), state, block, jax.random.fold_in(key, i))
        plans.append(plan)
    return plans, state


@pytest.mark.parametrize(
    "mechanism",
    [
        clip_cov(clip_cov_ratio=0.3, clip_cov_lb=0.0, clip_cov_ub=9.0),
        kl_cov(kl_cov_ratio=0.3),
        entropy_bonus(entropy_coef=0.1),
        chain(scale=counter(2.0), bonus=entropy_bonus(entropy_coef=0.1), target=_TARGET),
    ],
    ids=["clip_cov", "kl_cov", "entropy_bonus", "chain"],
)  # fmt: skip
def test_blockwise_is_a_loop_over_blocks(mechanism):
    _, signals, advantage = toy.random_batch(seed=3, shape=(ROWS, COLUMNS))
    plan, state = _run(blockwise(mechanism, rows=BLOCK), signals, advantage, key=5)
    parts, wanted_state = _reference_blocks(mechanism, signals, advantage, jax.random.key(5))

    chex.assert_trees_all_close(state, wanted_state, rtol=2e-6)
    for field in ("advantage", "pg_weight", "counted", "ratio_low", "ratio_high"):
        wanted = np.concatenate([getattr(p, field) for p in parts])
        np.testing.assert_allclose(getattr(plan, field), wanted, rtol=2e-6, err_msg=field)
    assert set(plan.terms) == set(mechanism.terms)
    for name, found in plan.terms.items():
        wanted = np.concatenate([p.terms[name] for p in parts]) / len(parts)
        np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=1e-9, err_msg=name)
    assert set(plan.metrics) == set(parts[0].metrics)
    for name, found in plan.metrics.items():
        wanted = np.sum([p.metrics[name] for p in parts], axis=0)
        np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=1e-7, err_msg=name)


def test_one_block_is_the_mechanism_but_for_the_key():
    _, signals, advantage = toy.random_batch(shape=(ROWS, COLUMNS))
    mechanism = kl_cov(kl_cov_ratio=0.3)
    chex.assert_trees_all_close(
        _run(blockwise(mechanism, rows=ROWS), signals, advantage), _run(mechanism, signals, advantage), rtol=2e-6
    )


def test_blockwise_keeps_what_was_raised_and_reported_before():
    _, signals, advantage = toy.random_batch(shape=(ROWS, COLUMNS))
    before = entropy_bonus(entropy_coef=0.1)
    blocks = blockwise(entropy_bonus(entropy_coef=0.2), rows=BLOCK)
    both, _ = _run(chain(before=before, kl=kl_cov(kl_cov_ratio=0.3), blocks=blocks), signals, advantage)
    kl, _ = _run(kl_cov(kl_cov_ratio=0.3), signals, advantage)
    parts = [_run(m, signals, advantage)[0].terms["entropy"] for m in (before, blocks)]
    np.testing.assert_allclose(both.terms["entropy"], parts[0] + parts[1], rtol=2e-6)
    np.testing.assert_array_equal(both.terms["abs_log_ratio"], kl.terms["abs_log_ratio"])
    np.testing.assert_array_equal(both.metrics["kl_cov/selected_fraction"], kl.metrics["kl_cov/selected_fraction"])


def test_blockwise_compares_by_mechanism_and_rows():
    assert blockwise(kl_cov(), rows=2).update == blockwise(kl_cov(ppo_kl_coef=0.1), rows=2).update
    assert blockwise(kl_cov(), rows=2).update != blockwise(kl_cov(), rows=3).update
    assert blockwise_normaliser(token_mean, rows=2) == blockwise_normaliser(token_mean, rows=2)


@pytest.mark.parametrize("normaliser", [token_mean, sequence_mean_token_mean, token_sum])
def test_blockwise_normaliser_is_a_mean_of_the_blocks(normaliser):
    batch, _, values = toy.random_batch(shape=(ROWS, COLUMNS))
    values = jnp.abs(values)
    weight = blockwise_normaliser(normaliser, rows=BLOCK)(batch.loss_mask, batch)
    blocks = []
    for i in range(0, ROWS, BLOCK):
        part = jax.tree.map(lambda x, i=i: x[i : i + BLOCK], batch)
        blocks.append(np.sum(normaliser(part.loss_mask, part) * values[i : i + BLOCK]))
    np.testing.assert_allclose(np.sum(weight * values), np.mean(blocks), rtol=2e-6)


@pytest.mark.parametrize("rows", [4, 5, 12])
def test_blocks_must_divide_the_batch(rows):
    batch, signals, advantage = toy.random_batch(shape=(ROWS, COLUMNS))
    with pytest.raises(ValueError, match=f"rows = {rows} does not divide the {ROWS} rows"):
        _run(blockwise(entropy_bonus(), rows=rows), signals, advantage)
    with pytest.raises(ValueError, match=f"rows = {rows} does not divide the {ROWS} rows"):
        blockwise_normaliser(token_mean, rows=rows)(batch.loss_mask, batch)


def test_blocks_must_have_rows():
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        blockwise(entropy_bonus(), rows=0)
    with pytest.raises(ValueError, match="rows must be at least 1, got -1"):
        blockwise_normaliser(token_mean, rows=-1)


def test_metrics_of_one_name_add_up():
    _, signals, advantage = toy.random_batch(shape=(ROWS, COLUMNS))
    one, two = jnp.float32(1.0), jnp.float32(2.0)
    plan = initial_plan(signals.batch, advantage).report(a__b=(one, two), c=(one, one)).report(a__b=(two, one))
    chex.assert_trees_all_equal(plan.metrics, {"a/b": (jnp.float32(3.0), jnp.float32(3.0)), "c": (one, one)})


# walk


def _raise_penalty(plan, signals, key):
    """A term on the first token of every row, and one whose coefficient is 0."""
    first = signals.batch.loss_mask & ~jnp.roll(signals.batch.loss_mask, 1, axis=1)
    first = first.at[:, 0].set(signals.batch.loss_mask[:, 0])
    return plan.raise_term("some", first.astype(plan.advantage.dtype)).raise_term(
        "none", jnp.zeros_like(plan.advantage)
    )


def _drop_long(plan, signals, key):
    """Takes tokens with a high score out of the denominator, and writes garbage outside the mask."""
    high = signals.batch.loss_mask & (signals.scores["entropy"] > 1.0)
    advantage = jnp.where(signals.batch.loss_mask, plan.advantage, jnp.nan)
    return plan.replace(counted=plan.counted & ~high, advantage=advantage)


def _raise_nothing(plan, signals, key):
    return plan.raise_term("none", jnp.zeros_like(plan.advantage))


def _walk(mechanism, signals, advantage, key=0):
    plan = initial_plan(signals.batch, advantage)
    return jax.jit(lambda *args: walk(mechanism.update, *args))(plan, mechanism.init(), signals, jax.random.key(key))


def _assert_walk_is_update(mechanism, signals, advantage):
    *found, touched = _walk(mechanism, signals, advantage, key=5)
    chex.assert_trees_all_equal(tuple(found), _run(mechanism, signals, advantage, key=5))
    assert all(not np.any(np.asarray(mark) & ~np.asarray(signals.batch.loss_mask)) for mark in touched.values())
    return {name: np.asarray(mark) for name, mark in touched.items()}


def test_walk_runs_a_nested_chain_and_says_who_touched_what():
    _, signals, advantage = toy.random_batch(seed=2, shape=(ROWS, COLUMNS))
    mask = np.asarray(signals.batch.loss_mask)
    inner = chain(clip=clip_range(), bonus=entropy_bonus(entropy_coef=0.0), term=stateless(_raise_penalty))
    mechanism = chain(
        count=counter(1.0), cov=kl_cov(kl_cov_ratio=0.3, keep_clip=True), inner=inner, drop=stateless(_drop_long)
    )
    touched = _assert_walk_is_update(mechanism, signals, advantage)

    assert set(touched) == {"count", "inner.clip", "inner.bonus", "inner.term", "drop", "cov"}
    np.testing.assert_array_equal(touched["count"], mask)  # noise on pg_weight
    np.testing.assert_array_equal(touched["inner.clip"], mask)
    assert not touched["inner.bonus"].any()
    first = mask & (np.cumsum(mask, axis=1) == 1)
    np.testing.assert_array_equal(touched["inner.term"], first)
    np.testing.assert_array_equal(touched["drop"], mask & (np.asarray(signals.scores["entropy"]) > 1.0))
    plan, _ = _run(mechanism, signals, advantage, key=5)
    selected, count = map(int, plan.metrics["kl_cov/selected_fraction"])
    assert 0 < touched["cov"].sum() == selected < count == mask.sum()


@pytest.mark.parametrize(
    ("mechanism", "names"),
    [
        (chain(), []),
        (counter(1.0), ["compose_test"]),
        (kl_cov(kl_cov_ratio=0.3), ["kl_cov"]),
        (stateless(_add_one), ["compose_test"]),
        (blockwise(kl_cov(kl_cov_ratio=0.3), rows=BLOCK), ["kl_cov"]),
        (chain(blocks=blockwise(chain(a=clip_range(), b=kl_cov()), rows=BLOCK)), ["blocks"]),
        (chain(outer=chain(middle=chain(a=stateless(_raise_nothing)))), ["outer.middle.a"]),
    ],
    ids=["empty", "no_chain", "method", "stateless", "blockwise", "blocks_of_a_chain", "deep"],
)
def test_walk_of_any_mechanism_is_its_update(mechanism, names):
    _, signals, advantage = toy.random_batch(seed=3, shape=(ROWS, COLUMNS))
    assert list(_assert_walk_is_update(mechanism, signals, advantage)) == names


def test_a_block_of_a_chain_is_one_part():
    _, signals, advantage = toy.random_batch(seed=3, shape=(ROWS, COLUMNS))
    blocks = blockwise(chain(a=entropy_bonus(), b=kl_cov(kl_cov_ratio=0.3, keep_clip=True)), rows=BLOCK)
    touched = _assert_walk_is_update(chain(blocks=blocks), signals, advantage)["blocks"]
    parts, _ = _reference_blocks(blocks._replace(update=blocks.update.update), signals, advantage, jax.random.key(0))
    assert 0 < touched.sum() == sum(int(p.metrics["kl_cov/selected_fraction"][0]) for p in parts) < touched.size


def test_a_coefficient_that_stays_nan_was_not_touched():
    _, signals, advantage = toy.random_batch()
    advantage = advantage.at[0, 0].set(jnp.nan)
    assert signals.batch.loss_mask[0, 0]
    *_, touched = _walk(chain(bonus=entropy_bonus(), add=stateless(_add_one)), signals, advantage)
    assert not np.any(touched["bonus"]) and not touched["add"][0, 0] and np.all(touched["add"][0, 1])
