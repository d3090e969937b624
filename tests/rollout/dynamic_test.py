"""Dynamic sampling: which groups are kept, where they are put, how many rounds there are, and when that is an error."""

import functools
import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import rollouts

from jentropy.data.source import Prompts
from jentropy.rewards.shaping import overlong_reward
from jentropy.rollout.dynamic import DynamicSampling, ExhaustedError, dynamic_rollouts, judge_groups, place_groups

COLUMNS = 5


def graded(accuracy, *, valid=None, lengths=None, offset=0, **row_data):
    """Rows of the accuracy `[P, G]`, whose every array tells them from the rows of another `offset`."""
    accuracy = np.asarray(accuracy, np.float32)
    num_rows = accuracy.size
    lengths = np.full(num_rows, COLUMNS) if lengths is None else np.asarray(lengths).reshape(-1)
    mask = np.arange(COLUMNS)[None, :] < lengths[:, None]
    valid = np.ones(num_rows, bool) if valid is None else np.asarray(valid, bool).reshape(-1)
    number = offset + np.arange(num_rows)
    per_token = number[:, None] * np.ones(COLUMNS)
    batch = rollouts(
        mask, rewards=accuracy.reshape(-1, 1), group=np.arange(num_rows) // accuracy.shape[1],
        logp_old=np.float32(per_token), token_data={"value": np.float32(number[:, None] + mask)},
        row_data={"is_valid": valid, "truncated": np.asarray(number % 2 == 0), **row_data},
    )  # fmt: skip
    return batch.replace(tokens=jnp.asarray(per_token, jnp.int32))


judge = functools.partial(jax.jit, static_argnames=("column", "num_groups"))(judge_groups)


def varies(batch, column=0):
    judged = judge(batch, column=column, num_groups=int(batch.group.max()) + 1)
    return np.asarray(judged.varies).tolist(), (float(judged.total), float(judged.count))


def test_a_group_is_kept_if_its_accuracy_differs():
    accuracy = [[1, 1, 1], [0, 0, 0], [1, 0, 0], [0, 1, 1], [0.5, 0.5, 0.5], [0.5, 0.5, 0.25]]
    found, (total, count) = varies(graded(accuracy))
    assert found == [False, False, True, True, False, True]
    assert (total, count) == (3 + 1 + 2 + 1.5 + 1.25, 18)


def test_rows_that_are_not_valid_do_not_count():
    """Whatever they hold; a group with one valid row, or none, does not vary."""
    accuracy = [[1, 1, 0], [1, 0, 0], [1, 0, 1], [1, 0, 1], [np.nan, 1, 1], [np.nan, 0, 1]]
    valid = [[1, 1, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0], [0, 1, 1], [0, 1, 1]]
    found, (total, count) = varies(graded(accuracy, valid=valid))
    assert found == [False, True, False, False, False, True]
    assert (total, count) == (2 + 1 + 0 + 2 + 1, 2 + 2 + 1 + 2 + 2)


def test_rows_in_which_the_accuracy_alone_is_not_valid_do_not_count():
    accuracy = np.array([[1, 1, 0], [1, 0, 0]], np.float32)
    known = np.array([[1, 1], [1, 1], [0, 1], [1, 1], [1, 1], [0, 1]], bool)
    batch = graded(accuracy, reward_is_valid=known)
    batch = batch.replace(rewards=jnp.concatenate([batch.rewards, jnp.ones((6, 1))], axis=1))
    assert varies(batch) == ([False, True], (3.0, 4.0))


def test_rounding_is_no_difference_and_a_difference_of_one_ulp_is():
    """verl compares `numpy.std` with 0, which is 1.4e-17 for four times 0.1 in float64."""
    ulp = np.nextafter(np.float32(0.1), np.float32(1))
    assert varies(graded([[0.1] * 4, [0.1, 0.1, 0.1, ulp], [0.0, -0.0, 0.0, 0.0]]))[0] == [False, True, False]


def test_a_nan_is_not_filtered_away():
    """The step must see it, skip the update and say so, as it does without dynamic sampling."""
    assert varies(graded([[np.nan, 1, 1], [1, 1, 1], [np.inf, 1, 1]]))[0] == [True, False, True]


def test_the_order_of_rows_does_not_matter():
    batch = graded([[1, 1, 1], [1, 0, 0], [0, 0, 0], [0, 1, 0]])
    order = np.random.default_rng(0).permutation(12)
    assert varies(jax.tree.map(lambda x: x[order], batch)) == varies(batch)


def test_shaped_rewards_do_not_fool_it():
    """All right and all wrong, in many lengths: the sum of rewards differs in every group, the accuracy in none."""
    lengths = [[1, 3, 5], [2, 4, 5], [5, 5, 4]]
    batch = graded([[1, 1, 1], [0, 0, 0], [1, 0, 1]], lengths=lengths)
    penalty = overlong_reward(max_length=5, overlong_buffer_length=4).function(batch.tokens, batch.loss_mask, {})
    batch = batch.replace(rewards=jnp.concatenate([batch.rewards, penalty[:, None]], axis=1))
    total = np.asarray(batch.rewards).sum(axis=1).reshape(3, 3)
    assert (np.ptp(total, axis=1) > 0).all()
    assert varies(batch, column=0)[0] == [False, False, True]
    assert varies(batch, column=1)[0] == [True, True, True]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), num_groups=st.integers(1, 3))
def test_it_is_the_spread_of_each_group(data, num_groups):
    values = st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=3, max_size=3)
    flags = st.lists(st.booleans(), min_size=3, max_size=3)
    accuracy = [data.draw(values) for _ in range(num_groups)]
    valid = [data.draw(flags) for _ in range(num_groups)]
    used = [[x for x, ok in zip(*pair) if ok] for pair in zip(accuracy, valid)]
    expected = [bool(xs) and max(xs) - min(xs) > 0 for xs in used]
    total, count = sum(map(sum, used)), sum(map(len, used))
    judged = judge(graded(accuracy, valid=valid), column=0, num_groups=num_groups)
    assert np.asarray(judged.varies).tolist() == expected
    assert (float(judged.total), float(judged.count)) == (total, count)


# Putting groups in places.


place = jax.jit(place_groups)


def placed(kept, fresh, source, padding=None):
    padding = np.zeros(len(source), bool) if padding is None else np.asarray(padding)
    return jax.tree.map(np.asarray, place(kept, fresh, np.int32(source), padding))


def test_groups_are_put_in_places_and_numbered_anew():
    kept, fresh = graded(np.zeros((3, 2)), offset=100), graded(np.ones((3, 2)), offset=200)
    rows = placed(kept, fresh, [-1, 2, 0])
    expected = [100, 101, 204, 205, 200, 201]
    for x in (rows.tokens, rows.logp_old):
        np.testing.assert_array_equal(x[:, 0], expected)
    np.testing.assert_array_equal(rows.token_data["value"][:, 0], np.array(expected) + 1)
    np.testing.assert_array_equal(rows.row_data["truncated"], np.array(expected) % 2 == 0)
    np.testing.assert_array_equal(rows.rewards[:, 0], [0, 0, 1, 1, 1, 1])
    np.testing.assert_array_equal(rows.row_id, np.arange(6))
    np.testing.assert_array_equal(rows.group, [0, 0, 1, 1, 2, 2])
    assert rows.row_data["is_valid"].all() and rows.loss_mask.all()


def test_all_groups_in_their_own_places_is_the_identity():
    batch = graded(np.ones((3, 2)))
    rows = placed(batch, batch, [0, 1, 2])
    for one, other in zip(jax.tree.leaves(rows), jax.tree.leaves(batch), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype


def test_a_parent_goes_with_its_group():
    batch = graded(np.ones((3, 2))).replace(parent=jnp.asarray([-1, 0, -1, -1, 5, -1], jnp.int32))
    np.testing.assert_array_equal(placed(batch, batch, [2, 2, 0]).parent, [1, -1, 3, -1, -1, 4])


def test_padding_has_no_valid_row_and_no_token():
    batch = graded(np.ones((3, 2)), valid=[[1, 1], [1, 0], [1, 1]])
    rows = placed(batch, batch, [1, 2, -1], [False, True, False])
    np.testing.assert_array_equal(rows.row_data["is_valid"], [True, False, False, False, True, True])
    np.testing.assert_array_equal(rows.loss_mask.any(axis=1), [True, True, False, False, True, True])
    np.testing.assert_array_equal(rows.rewards, batch.rewards)


def test_rows_that_do_not_fit_are_an_error():
    batch = graded(np.ones((3, 2)))
    with pytest.raises(ValueError, match="4 groups need a multiple of it of rows with is_valid, got 6 rows"):
        place_groups(batch, batch, jnp.zeros(4, jnp.int32), jnp.zeros(4, bool))
    bare = batch.replace(row_data={})
    with pytest.raises(ValueError, match="rows with is_valid"):
        place_groups(bare, bare, jnp.zeros(3, jnp.int32), jnp.zeros(3, bool))


# Rounds.

GROUPS = 4
RIGHT, WRONG, MIXED = [1, 1], [0, 0], [1, 0]


class Rounds:
    """What `dynamic_rollouts` needs, from a table of the groups of each round; it notes what it was asked for."""

    def __init__(self, *table):
        self.table, self.asked = table, []
        self.judge = functools.partial(judge, column=0, num_groups=GROUPS)
        self.place = place

    def next_prompts(self, number):
        self.asked.append(number)
        example_id = 100 * number + np.arange(GROUPS)
        return Prompts(np.zeros((GROUPS, 1), np.int32), np.ones(GROUPS, np.int32), {}, example_id)

    def sample_round(self, number, prompts):
        assert prompts.example_id[0] == 100 * number
        return graded(self.table[number], offset=100 * number)

    def __call__(self, **options):
        sampled = dynamic_rollouts(
            self.next_prompts, self.sample_round, settings=DynamicSampling(**options), num_groups=GROUPS,
            judge=self.judge, place=self.place,
        )  # fmt: skip
        metrics = {k: Fraction(float(s)) / Fraction(float(n)) if n else None for k, (s, n) in sampled.metrics.items()}
        return jax.tree.map(np.asarray, sampled.rollouts), sampled.example_id.tolist(), metrics


def test_one_round_is_enough_if_all_groups_vary():
    rounds = Rounds([MIXED] * 4, [RIGHT] * 4)
    rows, example_id, metrics = rounds()
    assert rounds.asked == [0] and example_id == [0, 1, 2, 3]
    for one, other in zip(jax.tree.leaves(rows), jax.tree.leaves(graded([MIXED] * 4)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert metrics == {
        "dynamic/rounds": 1, "dynamic/num_gen_prompts": 4, "dynamic/kept_fraction": 1, "dynamic/padded_fraction": 0,
        "dynamic/score/mean": Fraction(1, 2),
    }  # fmt: skip


def test_rounds_go_on_until_the_places_are_taken_and_the_surplus_is_cut():
    rounds = Rounds(
        [RIGHT, MIXED, WRONG, RIGHT],
        [WRONG] * 4,
        [RIGHT, WRONG, MIXED, RIGHT],
        [MIXED, RIGHT, MIXED, MIXED],
        [MIXED] * 4,
    )
    rows, example_id, metrics = rounds()
    assert rounds.asked == [0, 1, 2, 3]
    assert example_id == [1, 202, 300, 302]
    np.testing.assert_array_equal(rows.tokens[:, 0], [2, 3, 204, 205, 300, 301, 304, 305])
    np.testing.assert_array_equal(rows.rewards[:, 0], [1, 0] * 4)
    np.testing.assert_array_equal(rows.row_id, np.arange(8))
    np.testing.assert_array_equal(rows.group, np.arange(8) // 2)
    assert rows.row_data["is_valid"].all()
    assert metrics == {
        "dynamic/rounds": 4, "dynamic/num_gen_prompts": 16, "dynamic/kept_fraction": Fraction(5, 16),
        "dynamic/padded_fraction": 0, "dynamic/score/mean": Fraction(5 + 0 + 5 + 5, 32),
    }  # fmt: skip


def test_the_bound_is_an_error_that_says_how_many_there_were():
    rounds = Rounds(*[[RIGHT, MIXED, WRONG, RIGHT]] * 3)
    message = re.escape(
        "dynamic sampling: in 3 rounds of 4 prompts the responses of only 3 differ in reward 0, and 4 are wanted; "
        "raise max_num_gen_batches = 3, change the mixture or the size of groups, or fill up with on_exhausted='pad'"
    )
    with pytest.raises(ExhaustedError, match=message):
        rounds(max_num_gen_batches=3)
    assert rounds.asked == [0, 1, 2]


def test_the_last_round_allowed_may_be_enough():
    rounds = Rounds(*[[RIGHT, MIXED, WRONG, MIXED]] * 2)
    assert rounds(max_num_gen_batches=2)[1] == [1, 3, 101, 103]


def test_what_is_missing_is_padded_with_groups_of_the_last_round():
    rounds = Rounds([RIGHT, MIXED, WRONG, RIGHT], [RIGHT, WRONG, MIXED, RIGHT])
    rows, example_id, metrics = rounds(max_num_gen_batches=2, on_exhausted="pad")
    assert example_id == [1, 102, 100, 101]
    np.testing.assert_array_equal(rows.tokens[:, 0], [2, 3, 104, 105, 100, 101, 102, 103])
    real = np.arange(8) < 4
    np.testing.assert_array_equal(rows.row_data["is_valid"], real)
    np.testing.assert_array_equal(rows.loss_mask, np.repeat(real[:, None], COLUMNS, axis=1))
    np.testing.assert_array_equal(rows.group, np.arange(8) // 2)
    assert metrics["dynamic/padded_fraction"] == Fraction(1, 2) and metrics["dynamic/rounds"] == 2


def test_padding_may_be_all_there_is():
    rows, example_id, metrics = Rounds([RIGHT, WRONG, WRONG, RIGHT])(max_num_gen_batches=1, on_exhausted="pad")
    assert example_id == [0, 1, 2, 3] and metrics["dynamic/padded_fraction"] == 1
    assert not rows.row_data["is_valid"].any() and not rows.loss_mask.any()


def test_padding_is_for_the_last_round_only():
    rows, example_id, metrics = Rounds([RIGHT] * 4, [MIXED] * 4)(max_num_gen_batches=2, on_exhausted="pad")
    assert example_id == [100, 101, 102, 103] and metrics["dynamic/padded_fraction"] == 0
    assert rows.row_data["is_valid"].all()


def test_any_number_of_rounds_runs_the_same_programs():
    rounds = Rounds([MIXED] * 4)
    rounds()
    before = judge._cache_size(), place._cache_size()
    rounds.table = ([RIGHT, MIXED, WRONG, RIGHT], [WRONG] * 4, [MIXED, RIGHT, RIGHT, RIGHT], [RIGHT] * 4)
    rounds(max_num_gen_batches=4, on_exhausted="pad")
    assert (judge._cache_size(), place._cache_size()) == before


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), share=st.floats(0.05, 0.9))
def test_the_kept_groups_are_the_first_that_vary(seed, share):
    """In the order of rounds and prompts, each as it was sampled; the rest is padding."""
    rng = np.random.default_rng(seed)
    table = [[MIXED if u < share else [RIGHT, WRONG][int(u * 1e6) % 2] for u in rng.random(GROUPS)] for _ in range(6)]
    rounds = Rounds(*table)
    rows, example_id, metrics = rounds(max_num_gen_batches=6, on_exhausted="pad")
    mixed = [100 * r + p for r, part in enumerate(table) for p, group in enumerate(part) if group == MIXED]
    expected = mixed[:GROUPS]
    assert example_id[: len(expected)] == expected
    np.testing.assert_array_equal(rows.row_data["is_valid"], np.repeat(np.arange(GROUPS) < len(expected), 2))
    assert len(set(example_id)) == GROUPS and set(rounds.asked) == set(range(int(metrics["dynamic/rounds"])))
    seen = [100 * r + p for r in rounds.asked for p in range(GROUPS)]
    assert metrics["dynamic/kept_fraction"] == Fraction(float(np.float32(sum(m in seen for m in mixed)))) / len(seen)
    for place, prompt in enumerate(example_id):
        first = 100 * (prompt // 100) + 2 * (prompt % 100)
        np.testing.assert_array_equal(rows.tokens[2 * place : 2 * place + 2, 0], [first, first + 1])


# Settings.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_num_gen_batches": 0}, "max_num_gen_batches must be at least 1, got 0"),
        ({"on_exhausted": "stop"}, "on_exhausted must be error or pad, got 'stop'"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DynamicSampling(**options)


def test_the_metric_is_a_reward_by_name_or_place():
    names = ["right", "format", "format"]
    assert DynamicSampling().column(names) == 0
    assert DynamicSampling(metric="right").column(names) == 0
    assert DynamicSampling(metric=2).column(names) == 2
    for metric, message in [
        ("overlong", r"metric must be one of the rewards \['right', 'format', 'format'\], given once, got 'overlong'"),
        ("format", r"given once, got 'format'"),
        (3, "metric must be below 3, the number of rewards, got 3"),
        (-1, "metric must be below 3, the number of rewards, got -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            DynamicSampling(metric=metric).column(names)
