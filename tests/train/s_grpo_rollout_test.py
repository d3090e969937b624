"""S-GRPO's rollouts: one thought per prompt and answers at places of it, against a plain reconstruction."""

import functools

import fiddle as fdl
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from forked_runs import check_refused, check_resume, forked, make_stepper

from jentropy.advantages.s_grpo import s_grpo
from jentropy.data.task import chain_sum_exits_task, chain_sum_task
from jentropy.data.thoughts import BeforeMarker
from jentropy.data.tokenizer import CHAIN_SUM_EXITS
from jentropy.rollout.s_grpo import SerialExits, exits, gather
from jentropy.train.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("own_folders")

PROMPTS, EXITS, START, NEW, COLUMNS = 8, 2, 7, 16, 23
EXIT = 14


def config(strategy=None, **fields):
    strategy = fdl.Config(SerialExits) if strategy is None else strategy
    fields = {"num_prompts": PROMPTS, "num_generations": EXITS + 1, **fields}
    found = forked(strategy, fdl.Config(s_grpo), **fields)
    found.task = fdl.Config(chain_sum_exits_task)
    return found


@pytest.fixture(scope="module")
def rollout(own_folders):
    """The rows of one rollout, its prompts, what sampling says of itself, the trainer's score of the rows."""
    step, state, _ = make_stepper(config())
    rows, _, said = step._sample(state, 0)
    jax.tree.map(np.testing.assert_array_equal, rows, step._sample(state, 0)[0])
    score = step._forker._score(state.params, rows)
    return jax.device_get((rows, said, score)), step._source.batch(0, 0, PROMPTS)


def test_groups_are_one_response_and_its_exits(rollout):
    (rows, said, score), prompts = rollout
    assert rows.tokens.shape == (PROMPTS * (1 + EXITS), COLUMNS)
    np.testing.assert_array_equal(rows.row_id, np.arange(len(rows.row_id)))
    dropped = 0
    for p in range(PROMPTS):
        group = [p, *(PROMPTS + p * EXITS + e for e in range(EXITS))]
        assert (rows.group[group] == p).all() and rows.row_data["exit_order"][group].tolist() == [EXITS, 0, 1]
        assert (rows.tokens[group, :START] == prompts.tokens[p]).all()
        assert rows.parent[group].tolist() == [-1, p, p] and rows.fork[p] == START
        response = CHAIN_SUM_EXITS.decode(rows.tokens[p, START:]).split("|")[0]
        places = min(response.find("X"), NEW - 2)
        if places < EXITS:
            dropped += 1
            assert not rows.loss_mask[group].any() and not rows.row_data["is_valid"][group].any()
            continue
        assert rows.row_data["is_valid"][group].all()
        begins = []
        for row in group[1:]:
            length = int(rows.row_data["prefix_length"][row])
            fork, end = int(rows.fork[row]), int(np.flatnonzero(rows.loss_mask[row])[-1]) + 1
            assert fork == START + length and rows.tokens[row, fork - 1] == EXIT
            np.testing.assert_array_equal(rows.tokens[row, : fork - 1], rows.tokens[p, : fork - 1])
            assert rows.loss_mask[row].tolist() == [START <= c < end for c in range(COLUMNS)]
            text = CHAIN_SUM_EXITS.decode(rows.tokens[row, START:end])
            answer = str(prompts.fields["answer"][p])
            assert rows.rewards[row, 0] == (text.find("|") == len(text) - 1 and text[-3:-1] == f"X{answer}")
            begins.append(length - 1)
        assert 1 <= begins[0] < begins[1] <= places
    assert said["rollout/dropped_fraction"] == (dropped, PROMPTS) and 0 < dropped < PROMPTS
    assert said["rollout/padded_fraction"] == (dropped * (1 + EXITS), PROMPTS * (1 + EXITS))
    np.testing.assert_allclose(rows.logp_sampler[rows.loss_mask], score[rows.loss_mask], atol=2e-5)
    forced = rows.loss_mask & (np.arange(COLUMNS)[None, :] < rows.fork[:, None])
    np.testing.assert_array_equal(rows.logp_sampler[forced], score[forced])
    assert forced.any() and (score[forced] < 0).all()


def thoughts(lengths, num_columns=14):
    """Roots whose thought has so many tokens, behind a prompt of two; then the exit token, an answer and the end."""
    tokens, mask = np.ones((len(lengths), num_columns), np.int32), np.zeros((len(lengths), num_columns), bool)
    for row, length in enumerate(lengths):
        tokens[row, 2 + length : 5 + length] = [EXIT, 3, 15][: max(num_columns - 2 - length, 0)]
        mask[row, 2 : min(5 + length, num_columns)] = True
    rows = toy.rollouts(mask, row_data={"is_valid": np.ones(len(lengths), bool), "truncated": ~mask.any(axis=1)})
    return rows.replace(tokens=jnp.asarray(tokens), fork=jnp.full(len(lengths), 2, jnp.int32))


@functools.partial(jax.jit, static_argnames="inducer")
def places_of(rows, index, inducer=(EXIT,)):
    return exits((3, 12, inducer, BeforeMarker((EXIT,))), rows, jax.random.key(0), index)


def test_places_are_drawn_without_replacement_and_each_as_often():
    (prefixes, enough), _ = places_of(thoughts([6] * 400), jnp.int32(0))
    places = np.asarray(prefixes.length).reshape(400, 3) - 3
    assert enough.all() and (np.diff(places, axis=1) > 0).all()
    count = np.bincount(places.ravel(), minlength=7)
    assert count[0] == 0 and (abs(count[1:] - 200) < 4 * np.sqrt(100)).all()
    (other, _), _ = places_of(thoughts([6] * 400), jnp.int32(1))
    assert 0.5 < np.mean(other.length != prefixes.length)
    others = thoughts([6] * 100 + [9] * 300)
    np.testing.assert_array_equal(places_of(others, jnp.int32(0))[0][0].length[:300], prefixes.length[:300])


def test_a_thought_without_end_or_with_too_few_places_is_dropped():
    rows = thoughts([2, 3, 12, 9, 0] * 80)
    rows = rows.replace(row_data={**rows.row_data, "is_valid": np.arange(400) != 6})
    (prefixes, enough), metrics = places_of(rows, jnp.int32(0))
    assert enough[:10].tolist() == [False, True, False, True, False, False, False, False, True, False]
    assert tuple(map(float, metrics["rollout/dropped_fraction"])) == (241, 400)
    assert prefixes.is_valid.tolist() == np.repeat(enough, 3).tolist()
    assert prefixes.length[3:6].tolist() == [4, 5, 6]
    tokens = np.asarray(prefixes.tokens[3])
    assert tokens[:4].tolist() == [1, 1, 1, EXIT]


def test_an_exit_leaves_room_for_an_answer():
    """With seven tokens that ask for it, in twelve, at most four of the thought may stay."""
    rows = thoughts([9] * 400)
    (prefixes, enough), _ = places_of(rows, jnp.int32(0), inducer=(EXIT, 4, 5, 6, 7, 8, EXIT))
    assert enough.all() and set(np.asarray(prefixes.length).tolist()) == {2 + k + 7 for k in (1, 2, 3, 4)}
    row = np.asarray(prefixes.tokens[0])
    length = int(prefixes.length[0])
    assert row[length - 7 : length].tolist() == [EXIT, 4, 5, 6, 7, 8, EXIT] and (row[: length - 7] == 1).all()


@pytest.mark.parametrize(("prefix", "inducer"), [(True, True), (True, False), (False, True), (False, False)])
def test_what_the_loss_covers(prefix, inducer):
    roots = thoughts([4])
    mask = np.arange(14)[None, :] >= np.array([[5], [6]])
    grown = toy.rollouts(mask & (np.arange(14) < 8), row_id=[1, 2], group=[0, 1], row_data={
        "is_valid": np.ones(2, bool), "truncated": np.zeros(2, bool), "prefix_length": np.array([3, 4], np.int32),
    })  # fmt: skip
    grown = grown.replace(fork=jnp.array([5, 6], jnp.int32))
    static = SerialExits(loss_on_prefix=prefix, loss_on_inducer=inducer), 2, 1
    rows, _ = jax.jit(functools.partial(gather, static))(roots, grown, jnp.ones(1, bool))
    np.testing.assert_array_equal(rows.loss_mask[0], roots.loss_mask[0])
    for row, fork in ((1, 5), (2, 6)):
        wanted = [prefix] * (fork - 3) + [inducer] + [True] * (8 - fork)
        assert rows.loss_mask[row, 2:8].tolist() == wanted and not rows.loss_mask[row, 8:].any()
    assert rows.group.tolist() == [0, 0, 0] and rows.row_data["exit_order"].tolist() == [2, 0, 1]


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    lines = read_metrics(check_resume(config(), tmp_path) / "metrics.jsonl")
    lines = [line for line in lines if "s_grpo/decayed_reward/mean" in line]
    assert len(lines) == 4
    assert all(line["sampler/logp_diff_relative"] < 1e-5 and line["rollout/dropped_fraction"] < 1 for line in lines)


def test_what_cannot_work_is_an_error_when_it_is_built():
    without = config()
    without.task = fdl.Config(chain_sum_task)
    check_refused(without, "the thought of task 'chain_sum' must be given, for exits from a thought, got None")
    check_refused(config(num_generations=16), r"num_generations must be at most 14 \+ 1, .* 16 tokens, got 16")
    check_refused(config(num_generations=1), "num_generations must be at least 2")
    none = config()
    none.stages[0].strategy = None
    check_refused(none, "a method needs exit_order, .* a `strategy`")
