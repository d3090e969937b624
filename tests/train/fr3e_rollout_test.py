"""FR3E's rollouts in training, against a plain reconstruction of their rows."""

import dataclasses
import functools

import fiddle as fdl
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from forked_runs import check_refused, check_resume, forked, make_stepper

from jentropy import config as config_lib
from jentropy.advantages.fr3e import fr3e
from jentropy.advantages.remax import remax
from jentropy.data.task import chain_sum_task
from jentropy.rollout.dynamic import DynamicSampling
from jentropy.rollout.fr3e import Fr3e, anchored, base_rows
from jentropy.train.evaluate import grade_on_host
from jentropy.train.metrics import read_metrics
from jentropy.train.replay import replay_kept
from jentropy.train.sharding import replicated

pytestmark = pytest.mark.usefixtures("own_folders")

PROMPTS, SIZE, ANCHORS, GAP, START, COLUMNS = 4, 4, 2, 2, 7, 14
STATES = PROMPTS * ANCHORS
ROOTS = PROMPTS * SIZE


def config(**settings):
    return forked(fdl.Config(Fr3e, num_anchors=ANCHORS, min_gap=GAP, **settings), fdl.Config(fr3e))


@pytest.fixture(scope="module")
def rollout(own_folders):
    """The rows of one rollout, its prompts, its roots with their entropies, and what sampling says of itself."""
    step, state, _ = make_stepper(config())
    prompts = step._source.batch(0, 1, PROMPTS)
    index = jax.device_put(np.int32(1), replicated(step._mesh))
    placed = jax.device_put((prompts.tokens, prompts.length, prompts.fields))
    roots, entropy = step._rollout(state.params, step._key, index, *placed, state.decode_state)
    rows, example_id, said = step._sample(state, 1)
    np.testing.assert_array_equal(example_id, prompts.example_id)
    again = step._sample(state, 1)[0]
    jax.tree.map(np.testing.assert_array_equal, rows, again)
    return jax.device_get((rows, roots, entropy, said)), prompts


def anchors_of(entropy, mask):
    """By hand: the columns of largest entropy, without the first and the last, `GAP` apart, ascending."""
    left = np.flatnonzero(mask)[1:-1].tolist()
    found = []
    while left and len(found) < ANCHORS:
        best = max(left, key=lambda column: (entropy[column], -column))
        found.append(best)
        left = [column for column in left if abs(column - best) >= GAP]
    return sorted(found)


def test_roots_are_the_first_rows_as_without_a_strategy(rollout):
    (rows, roots, _, _), _ = rollout
    assert rows.tokens.shape == (ROOTS + STATES * SIZE, COLUMNS)
    for name in ("tokens", "loss_mask", "rewards", "row_id", "group", "parent", "fork", "logp_sampler"):
        np.testing.assert_array_equal(getattr(rows, name)[:ROOTS], getattr(roots, name))
    assert (rows.row_data["prefix_length"][:ROOTS] == 0).all()
    np.testing.assert_array_equal(rows.row_id, np.arange(len(rows.row_id)))


def test_each_state_is_an_anchor_of_the_first_response(rollout):
    (rows, roots, entropy, said), _ = rollout
    padded, total = said["rollout/padded_fraction"]
    assert total == len(rows.row_id)
    missing = 0
    for prompt in range(PROMPTS):
        base = prompt * SIZE
        columns = anchors_of(entropy[base], roots.loss_mask[base])
        for k in range(ANCHORS):
            first = ROOTS + (prompt * ANCHORS + k) * SIZE
            state = slice(first, first + SIZE)
            assert (rows.group[state] == PROMPTS + prompt * ANCHORS + k).all()
            if k >= len(columns):
                missing += SIZE
                assert not rows.loss_mask[state].any() and not rows.row_data["is_valid"][state].any()
                continue
            column = columns[k]
            assert rows.row_data["is_valid"][state].all()
            assert (rows.parent[state] == base).all() and (rows.fork[state] == column).all()
            assert (rows.row_data["prefix_length"][state] == column - START).all()
            assert (rows.tokens[state, :column] == roots.tokens[base, :column]).all()
            assert not rows.loss_mask[state, :column].any() and rows.loss_mask[state, column].all()
            assert rows.logp_sampler[state, column:][rows.loss_mask[state, column:]].max() < 0
    assert padded == missing and missing < STATES * SIZE


def test_a_forked_row_is_graded_as_a_whole_response(rollout):
    (rows, _, _, _), prompts = rollout
    text = "0123456789_=DSP|"
    for row in range(len(rows.row_id)):
        prompt = row // SIZE if row < ROOTS else (row - ROOTS) // (SIZE * ANCHORS)
        digits, answer = prompts.tokens[prompt], prompts.fields["answer"][prompt]
        assert (rows.tokens[row, :START] == digits).all()
        if rows.row_data["is_valid"][row]:
            end = np.flatnonzero(rows.loss_mask[row])[-1] + 1
            response = "".join(text[token] for token in rows.tokens[row, START:end])
            right = response[:-1].find("|") < 0 and len(response) >= 3 and response.endswith(f"{answer}|")
            assert rows.rewards[row, 0] == right
            assert len(response) <= 7 and rows.row_data["truncated"][row] == (response[-1] != "|")


def test_graders_of_text_see_whole_responses_and_no_padding(rollout):
    (rows, *_), prompts = rollout
    shown = []

    def grade(prompts, completions, *, answer, **fields):
        shown.extend(zip(prompts, completions, answer, strict=True))
        return [float(len(completion)) for completion in completions]

    task = chain_sum_task(reward="text")
    task = dataclasses.replace(task, rewards=(dataclasses.replace(task.rewards[0], function=grade),))
    grown = jax.tree.map(lambda x: jnp.asarray(x[ROOTS:]), rows)
    owner = np.repeat(np.arange(PROMPTS), ANCHORS * SIZE)
    found = grade_on_host(task, grown, prompts, owner)
    real = np.asarray(grown.row_data["is_valid"])
    np.testing.assert_array_equal(found.row_data["is_valid"], real)
    length = np.asarray(grown.row_data["prefix_length"] + grown.loss_mask.sum(axis=1))
    np.testing.assert_array_equal(found.rewards[:, 0], np.where(real, length, 0))
    assert [answer for _, _, answer in shown] == prompts.fields["answer"][owner][real].tolist()


def after_prompts(num_rows, **parts):
    """Rows of six response tokens behind a prompt of two."""
    rows = toy.rollouts(np.repeat(np.arange(8)[None, :] >= 2, num_rows, axis=0), **parts)
    return rows.replace(fork=jnp.full(num_rows, 2, jnp.int32))


def jitted(strategy, num_prompts):
    return jax.jit(functools.partial(anchored, (strategy, num_prompts)))


def test_a_right_and_a_wrong_base_of_each_prompt():
    strategy = Fr3e(num_anchors=1, num_bases=2, select="one_right_one_wrong")
    valid = np.array([1, 0, 1, 1, 1, 1, 1, 1, 1], bool)
    rewards = np.array([0, 1, 1, 0, 0, 0, 1, 1, 1], np.float32)
    rows = after_prompts(9, rewards=rewards, row_data={"is_valid": valid})
    index, found = base_rows(strategy, 3, rows)
    assert index[found].tolist() == [2, 0, 3, 6]
    assert found.tolist() == [[True, True], [False, True], [True, False]]
    prefixes = jitted(strategy, 3)(rows, jnp.zeros(rows.tokens.shape, jnp.float32))[0]
    assert not prefixes.is_valid[jnp.array([2, 5])].any()


def test_the_released_rule_takes_the_tokens_of_lowest_log_probability():
    rows = after_prompts(4)
    score = -np.random.default_rng(0).exponential(size=(4, 8))
    rows = rows.replace(logp_sampler=jnp.asarray(score, jnp.float32))
    entropy = jnp.zeros(rows.tokens.shape, jnp.float32)
    prefixes = jitted(Fr3e(num_anchors=2, anchors="log_prob"), 2)(rows, entropy)[0]
    for prompt in range(2):
        inner = np.asarray(rows.logp_sampler[2 * prompt, 3:7])
        wanted = np.sort(np.argsort(inner)[:2]) + 3
        np.testing.assert_array_equal(prefixes.length[2 * prompt : 2 * prompt + 2], wanted)
    with_entropy = jitted(Fr3e(num_anchors=2), 2)(rows, entropy)[0]
    np.testing.assert_array_equal(with_entropy.length, [3, 4, 3, 4])


def test_a_resumed_run_equals_an_uninterrupted_one_and_a_kept_step_is_done_again(tmp_path):
    kept = config()
    kept.keep_rollouts = (1,)
    whole = check_resume(kept, tmp_path)
    again = replay_kept(whole, 1)
    assert not again.differs and "rollout/padded_fraction" in again.recorded.keys() - again.found.keys()
    lines = [line for line in read_metrics(whole / "metrics.jsonl") if "fr3e/alpha" in line]
    assert len(lines) == 4 and all(0 <= line["rollout/padded_fraction"] < 0.7 for line in lines)
    timing = read_metrics(whole / "timing.jsonl")
    for line, found in zip(lines, timing, strict=True):
        rows = (ROOTS + STATES * SIZE) * (1 - line["rollout/padded_fraction"])
        assert found["tokens"] == pytest.approx(rows * line["response_length/mean"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_anchors": 0}, "num_anchors must be at least 1, got 0"),
        ({"num_bases": 0}, "num_bases must be at least 1, got 0"),
        ({"min_gap": 0}, "min_gap must be at least 1, got 0"),
        ({"exclude_last": -1}, "exclude_last must be at least 0, got -1"),
        ({"anchors": "newline"}, "anchors must be entropy or log_prob, got 'newline'"),
        ({"select": "best"}, "select must be first or one_right_one_wrong, got 'best'"),
        ({"select": "one_right_one_wrong"}, "num_bases must be 2 with select='one_right_one_wrong', got 1"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        Fr3e(**settings)


def test_what_cannot_work_is_an_error_when_it_is_built():
    check_refused(forked(fdl.Config(Fr3e, num_anchors=6), fdl.Config(fr3e)), "num_anchors must be so few .* got 6")
    check_refused(forked(fdl.Config(Fr3e, num_anchors=3, min_gap=3), fdl.Config(fr3e)), "num_anchors must be so few")
    many = forked(fdl.Config(Fr3e, num_anchors=2, num_bases=5), fdl.Config(fr3e))
    check_refused(many, "num_bases must be at most num_generations = 4, got 5")
    dynamic = forked(fdl.Config(Fr3e), fdl.Config(fr3e), dynamic_sampling=fdl.Config(DynamicSampling))
    check_refused(dynamic, "stage 'before': dynamic_sampling and a strategy do not go together")
    check_refused(
        forked(fdl.Config(Fr3e), fdl.Config(remax)), "needs greedy_reward, which the rows of Fr3e cannot hold"
    )
    with pytest.warns(UserWarning, match="fr3e without its strategy"):
        config_lib.build(forked(None, fdl.Config(fr3e)))
