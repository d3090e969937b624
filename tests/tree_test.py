"""Statistics over forked rollouts: by hand, against loops on random forests, and against enumerated values."""

import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from jentropy import outcome, tree

ROWS, COLUMNS = 12, 9
property_test = hypothesis.settings(max_examples=40, deadline=None, derandomize=True)


def forest(parent, fork, group, *, row_id=None, valid=None):
    num = len(parent)
    rows = toy.rollouts(
        np.ones((num, 1), bool),
        group=group,
        row_id=row_id,
        row_data={"is_valid": np.ones(num, bool) if valid is None else valid},
    )
    return rows.replace(parent=jnp.asarray(parent, jnp.int32), fork=jnp.asarray(fork, jnp.int32))


@jax.jit
def _statistics(value, rows):
    valid = outcome.valid_rows(rows)
    states = tree.prefix_values(value, rows.group, valid)
    previous, known = tree.previous_value(states, rows, valid)
    leads, estimated = tree.state_leads(rows, valid), tree.is_estimated(rows.group, valid)
    return states, previous, known, tree.root_group(rows), leads, estimated


def statistics(value, rows):
    return [np.asarray(x) for x in _statistics(jnp.asarray(value, jnp.float32), rows)]


# Rows 0 and 1 are roots of one prompt; 2, 3 leave row 0 at column 4, 4, 5 at column 7; 6 leaves row 2 at column 6.
PARENT, FORK = [-1, -1, 0, 0, 0, 0, 2], [2, 2, 4, 4, 7, 7, 6]
GROUP, VALUE = [5, 5, 0, 0, 3, 3, 1], [1.0, 0.0, 1.0, 1.0, 0.0, 0.5, 9.0]


def test_by_hand():
    states, previous, known, root, leads, estimated = statistics(VALUE, forest(PARENT, FORK, GROUP))
    np.testing.assert_array_equal(states, [0.5, 0.5, 1.0, 1.0, 0.25, 0.25, 9.0])
    np.testing.assert_array_equal(previous, [0.0, 0.0, 0.5, 0.5, 1.0, 1.0, 1.0])
    np.testing.assert_array_equal(known, [False, False, True, True, True, True, True])
    np.testing.assert_array_equal(root, [5] * 7)
    np.testing.assert_array_equal(leads, [True, False, True, False, True, False, True])
    assert estimated.all()


def test_states_without_a_valid_row_are_passed_over():
    rows = forest(PARENT, FORK, GROUP, valid=[True, True, False, False, True, False, True])
    value = np.where(rows.row_data["is_valid"], VALUE, np.nan)
    states, previous, known, _, leads, estimated = statistics(value, rows)
    np.testing.assert_array_equal(states[[2, 4]], [0.0, 0.0])
    np.testing.assert_array_equal(estimated, [True, True, False, False, True, True, True])
    assert previous[4] == 0.5 and known[4]  # from the prompt, past the state at column 4
    assert not known[6] and previous[6] == 0.0  # the state that row 2 was drawn from is not known
    assert leads.tolist() == [True, False, False, False, True, False, True]


def test_a_parent_that_is_not_among_the_rows():
    _, previous, known, root, _, _ = statistics([1.0, 2.0, 4.0], forest([7, 7, -1], [3, 5, 0], [0, 1, 2]))
    assert known.tolist() == [False, True, False] and previous.tolist() == [0.0, 1.0, 0.0]
    assert root.tolist() == [0, 1, 2]


def test_one_row():
    states, previous, known, root, leads, _ = statistics([3.0], forest([-1], [0], [0]))
    assert (states, previous, known, root, leads) == (3.0, 0.0, False, 0, True)


@st.composite
def forests(draw):
    """Twelve rows of random trees in random order, with random ids, some of them not valid."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    row_id = rng.permutation(50)[:ROWS]
    states = [(-1, 0)]  # (index of the parent, fork), by group
    rows = [0]
    while len(rows) < ROWS:
        kind = rng.random()
        if kind < 0.2:
            states.append((-1, 0))
        elif kind < 0.6:
            parent = int(rng.integers(len(rows)))
            state = (parent, states[rows[parent]][1] + int(rng.integers(1, 4)))
            states += [state] if state not in states else []
        rows.append(int(rng.integers(len(states))) if kind >= 0.6 else len(states) - 1)
    name = rng.permutation(ROWS)[: len(states)]
    parent = [row_id[states[s][0]] if states[s][0] >= 0 else -1 for s in rows]
    arrays = (parent, [states[s][1] for s in rows], name[rows], row_id, rng.random(ROWS) < 0.8)
    order = rng.permutation(ROWS)
    return [np.asarray(x)[order] for x in arrays], rng.integers(-8, 8, ROWS) / 4


def expected(parent, fork, group, row_id, valid, value):
    """The statistics of `_statistics`, by loops."""
    num = len(parent)
    at = {int(row): i for i, row in enumerate(row_id)}
    members = {g: [i for i in range(num) if group[i] == g and valid[i]] for g in group}
    mean = {g: np.mean([value[i] for i in rows]) if rows else 0.0 for g, rows in members.items()}
    found = []
    for i in range(num):
        root, before = i, None
        while parent[root] >= 0:
            root = at[parent[root]]
        if parent[i] >= 0:
            siblings = {fork[j]: group[j] for j in range(num) if valid[j] and parent[j] == parent[i]}
            earlier = [f for f in siblings if f < fork[i]]
            state = siblings[max(earlier)] if earlier else group[at[parent[i]]]
            before = mean[state] if members[state] else None
        lead = bool(members[group[i]]) and row_id[i] == min(row_id[j] for j in members[group[i]])
        found.append((mean[group[i]], before or 0.0, before is not None, group[root], lead and valid[i]))
    return [np.asarray(x) for x in zip(*found)]


@property_test
@hypothesis.given(forests())
def test_random_forests(example):
    (parent, fork, group, row_id, valid), value = example
    rows = forest(parent, fork, group, row_id=row_id, valid=valid)
    found = statistics(np.where(valid, value, np.nan), rows)
    for ours, wanted in zip(found, expected(parent, fork, group, row_id, valid, value)):
        np.testing.assert_allclose(ours, wanted, rtol=2e-6)


@property_test
@hypothesis.given(forests(), st.integers(0, 99))
def test_order_and_padding_of_rows_change_nothing(example, seed):
    arrays, value = example
    order = np.random.default_rng(seed).permutation(ROWS)
    fill = (-1, 0, 0, 60, False)  # rows of a group that exists
    moved = [np.append(x[order], f) for x, f in zip(arrays, fill)]
    found = statistics(np.append(value[order], np.nan), forest(*moved[:3], row_id=moved[3], valid=moved[4]))
    whole = statistics(value, forest(*arrays[:3], row_id=arrays[3], valid=arrays[4]))
    for ours, wanted in zip(found, whole):
        np.testing.assert_allclose(ours[:-1], wanted[order], rtol=2e-6, atol=1e-7)


def test_the_error_of_a_value_falls_as_one_over_the_root_of_the_responses():
    rng, depth, actions = np.random.default_rng(0), 3, 4
    policy = {
        path: rng.dirichlet(np.ones(actions))
        for d in range(depth)
        for path in itertools.product(range(actions), repeat=d)
    }
    reward = {path: rng.integers(0, 2) for path in itertools.product(range(actions), repeat=depth)}

    def exact(path):
        return reward[path] if len(path) == depth else sum(p * exact((*path, a)) for a, p in enumerate(policy[path]))

    def sample(path, num):
        paths = [[*path] for _ in range(num)]
        for p in paths:
            while len(p) < depth:
                p.append(int(np.searchsorted(policy[tuple(p)].cumsum(), rng.random())))
        return [reward[tuple(p)] for p in paths]

    numbers, repeats = (4, 16, 64), 150
    states = [(), (0,), (1,), (2, 3)]
    errors = []
    for num in numbers:
        wanted = np.repeat(np.asarray([exact(s) for s in states], float), repeats)
        earned = np.concatenate([sample(s, num * repeats) for s in states]).astype(np.float32)
        group = np.repeat(np.arange(len(wanted), dtype=np.int32), num)
        found = tree.prefix_values(jnp.asarray(earned), jnp.asarray(group), jnp.ones(len(group), bool))
        errors.append(np.sqrt(np.mean(np.square(np.asarray(found)[::num] - wanted))))
    slope = np.polyfit(np.log(numbers), np.log(errors), 1)[0]
    assert abs(slope + 0.5) < 0.1, errors


# Anchors, blocks, last known values.


@functools.cache
def _anchors(num, **options):
    return jax.jit(functools.partial(tree.select_anchors, num=num, **options))


def anchors(score, mask, num, **options):
    score = np.asarray(score, np.float32)
    columns, valid = _anchors(num, **options)(score, np.broadcast_to(np.asarray(mask, bool), score.shape))
    return np.asarray(columns).tolist(), np.asarray(valid).tolist()


def greedy(score, mask, num, min_gap, exclude_last):
    """One anchor after the other, by loops."""
    candidates = [t for t in range(len(score)) if mask[t] and not np.isnan(score[t])]
    last = [t for t in range(len(score)) if mask[t]][max(sum(mask) - exclude_last, 0) :]
    candidates, found = [t for t in candidates if t not in last], []
    while candidates and len(found) < num:
        found.append(min(candidates, key=lambda t: (-score[t], t)))
        candidates = [t for t in candidates if abs(t - found[-1]) >= min_gap]
    missing = num - len(found)
    return sorted(found) + [len(score)] * missing, [True] * len(found) + [False] * missing


@pytest.mark.parametrize(("num", "min_gap", "exclude_last"), [(1, 1, 0), (3, 2, 1), (4, 1, 2), (11, 3, 0)])
@hypothesis.settings(max_examples=20, deadline=None, derandomize=True)
@hypothesis.given(st.integers(0, 2**32 - 1))
def test_anchors_against_a_loop(num, min_gap, exclude_last, seed):
    rng = np.random.default_rng(seed)
    score = rng.choice([-np.inf, -1.0, -0.0, 0.0, 0.5, 2.0, np.inf, np.nan], (3, COLUMNS))
    mask = rng.random((3, COLUMNS)) < rng.random((3, 1))
    columns, valid = anchors(score, mask, num, min_gap=min_gap, exclude_last=exclude_last)
    for row in range(3):
        assert (columns[row], valid[row]) == greedy(score[row], mask[row], num, min_gap, exclude_last)


def test_anchors_by_hand():
    assert anchors([1.0, 5.0, 4.0, 5.0, 9.0], [1, 1, 1, 1, 0], 2) == ([1, 3], [True, True])
    assert anchors([1.0, 5.0, 4.0, 5.0, 9.0], [1, 1, 1, 1, 0], 2, min_gap=3) == ([1, 5], [True, False])
    assert anchors([1.0, 5.0, 4.0, 5.0, 9.0], [1, 1, 1, 1, 0], 2, exclude_last=1) == ([1, 2], [True, True])
    assert anchors([2.0, 2.0, 2.0], True, 2) == ([0, 1], [True, True])
    assert anchors([0.0, 0.0, -0.0], [0, 1, 1], 1) == ([1], [True])


def test_more_anchors_than_tokens():
    assert anchors([3.0, 1.0], [True, False], 4) == ([0, 2, 2, 2], [True, False, False, False])
    assert anchors([3.0, 1.0], False, 2) == ([2, 2], [False, False])
    assert anchors([3.0, 1.0], True, 1, exclude_last=2) == ([2], [False])


@pytest.mark.parametrize(
    ("num", "options", "message"),
    [
        (0, {}, "num must be at least 1, got 0"),
        (-2, {}, "num must be at least 1, got -2"),
        (1, {"min_gap": 0}, "min_gap must be at least 1, got 0"),
        (1, {"exclude_last": -1}, "exclude_last must be not negative, got -1"),
    ],
)
def test_refusals(num, options, message):
    with pytest.raises(ValueError, match=message):
        tree.select_anchors(jnp.zeros(3), jnp.ones(3, bool), num, **options)


def test_blocks():
    mask = jnp.asarray([[False, True, True, True, True, False], [True] * 6])
    columns, valid = jnp.asarray([[2, 4], [0, 6]]), jnp.asarray([[True, True], [True, False]])
    wanted = [[-1, 0, 1, 1, 2, -1], [1] * 6]
    np.testing.assert_array_equal(tree.partition(columns, valid, mask), wanted)
    np.testing.assert_array_equal(tree.partition(columns[0], valid[0], mask[0]), wanted[0])


def test_last_known():
    value = jnp.asarray([[jnp.nan, 2.0, jnp.nan, 3.0], [1.0, 5.0, 6.0, 7.0]])
    known = jnp.asarray([[False, True, False, True], [False] * 4])
    np.testing.assert_array_equal(tree.last_known(value, known), [[0.0, 2.0, 2.0, 3.0], [0.0] * 4])
    np.testing.assert_array_equal(tree.last_known(jnp.asarray([4, -1, -1]), jnp.asarray([True, False, False])), [4] * 3)
