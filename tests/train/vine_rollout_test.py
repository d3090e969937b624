"""VinePPO's rollouts: states, what they share, what they are worth; and runs with them."""

import dataclasses

import fiddle as fdl
import numpy as np
import pytest
import toy
from forked_runs import check_refused, check_resume, forked

from jentropy import config as config_lib
from jentropy import embedded
from jentropy.advantages.grpo import grpo
from jentropy.advantages.vine import vine
from jentropy.data.source import Prompts
from jentropy.data.steps import EveryToken
from jentropy.data.task import chain_sum_task
from jentropy.rollout.strategy import Tools
from jentropy.rollout.vine import Vine, distinct_states
from jentropy.train.forked import total_weights
from jentropy.train.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("own_folders")

PAD, EOS, START, COLUMNS, PROMPTS, SIZE = 0, 9, 2, 9, 2, 4
RESPONSES = [
    *([1, 2, 3, 9], [1, 2, 9], [4, 5, 1, 2, 3, 9], [9]),
    *([1, 2, 3, 9], [1, 2, 3, 9], [1, 1, 1, 1, 1, 1, 1], [5, 9]),
]


def roots(prompt_tokens=((7, 7), (7, 8)), valid=None):
    tokens = np.full((8, COLUMNS), PAD, np.int32)
    mask = np.zeros((8, COLUMNS), bool)
    for row, response in enumerate(RESPONSES):
        tokens[row, :START] = prompt_tokens[row // SIZE]
        tokens[row, START : START + len(response)] = response
        mask[row, START : START + len(response)] = True
    valid = np.ones(8, bool) if valid is None else valid
    rows = toy.rollouts(mask, row_data={"is_valid": valid, "truncated": ~valid})
    return rows.replace(tokens=tokens, loss_mask=mask, fork=np.full(8, START, np.int32))


def worth(example, prefix, g):
    """What the g-th response from a prefix earns here."""
    return (7 * int(example) + sum((i + 1) * int(token) for i, token in enumerate(prefix)) + 3 * g) % 5


class Sampler:
    """`Tools.grow` whose rewards are `worth`: two columns, of which one is not given for every third row."""

    def __init__(self, example_id, num_rollouts):
        self.example_id, self.size, self.calls, self.seen = example_id, num_rollouts, [], []

    def __call__(self, prefixes, owner, first_row):
        self.calls.append((len(owner), first_row))
        rewards, valid, mask = [], [], []
        for s in range(len(owner)):
            assert prefixes.prompt_length[s] == START and prefixes.parent[s] == -1
            prefix = prefixes.tokens[s, : prefixes.length[s]]
            if prefixes.is_valid[s]:
                self.seen.append((owner[s], *prefix.tolist()))
            for g in range(self.size):
                rewards.append([worth(self.example_id[owner[s]], prefix, g), 1.0])
                valid.append(bool(prefixes.is_valid[s]))
                mask.append([valid[-1]] * 3)
        given = np.array([[v, v and row % 3 > 0] for row, v in enumerate(valid)])
        return toy.rollouts(
            np.array(mask), rewards=np.array(rewards, np.float32),
            row_data={"is_valid": np.array(valid), "reward_is_valid": given},
        )  # fmt: skip

    def tools(self):
        refused = None
        weights = np.array([2.0, 0.5], np.float32)
        return Tools(self, refused, refused, lambda arrays: arrays, refused, refused, weights, SIZE)


def task():
    return dataclasses.replace(chain_sum_task(), max_new_tokens=7, step_boundary=EveryToken(EOS))


def run(strategy, rows=None, example_id=(3, 5)):
    rows = roots() if rows is None else rows
    prompts = Prompts(np.zeros((2, START), np.int32), np.full(2, START), {}, np.array(example_id))
    sampler = Sampler(np.array(example_id), strategy.num_rollouts)
    found, metrics = strategy(rows, None, prompts, task(), sampler.tools())
    return found, {name: float(a) / float(b) for name, (a, b) in metrics.items()}, sampler


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_each_prefix_is_worth_the_mean_of_its_responses(batch):
    strategy = Vine(num_rollouts=3, batch=batch)
    rows, metrics, sampler = run(strategy)
    value, known, step = (rows.row_data[name] for name in ("prefix_value", "prefix_known", "step_id"))
    assert value.shape == known.shape == (8, 8) and value.dtype == np.float32
    wanted = {}
    for row, response in enumerate(RESPONSES):
        prompt, num_steps = row // SIZE, max(len(response) - (response[-1] == EOS), 1)
        assert known[row].tolist() == [k < num_steps for k in range(8)]
        assert step[row].tolist() == [
            min(c - START, num_steps - 1) if START <= c < START + len(response) else -1 for c in range(COLUMNS)
        ]
        for k in range(num_steps):
            wanted.setdefault((prompt, *rows.tokens[row, : START + k].tolist()), []).append((row, k))
    assert sorted(sampler.seen) == sorted(wanted), "every prefix is sampled once"
    order = sorted(wanted)
    for state, places in wanted.items():
        first = order.index(state) * 3
        totals = [2.0 * worth((3, 5)[state[0]], state[1:], g) + 0.5 * ((first + g) % 3 > 0) for g in range(3)]
        for row, k in places:
            assert value[row, k] == pytest.approx(np.mean(totals), abs=1e-6)
    num = sum(map(len, wanted.values()))
    assert metrics["rollout/num_states"] == len(wanted) < num
    assert metrics["rollout/shared_fraction"] == pytest.approx(1 - len(wanted) / num)
    assert metrics["rollout/num_mc_tokens"] == 9 * len(wanted)
    size = batch * PROMPTS
    assert sampler.calls == [(size, 8 + 3 * start) for start in range(0, len(wanted), size)]
    np.testing.assert_array_equal(rows.loss_mask, roots().loss_mask)


def test_states_beyond_the_limit_are_not_known():
    rows, metrics, _ = run(Vine(num_rollouts=1, max_states=1))
    assert rows.row_data["prefix_known"].sum(axis=1).tolist() == [1] * 8
    assert metrics["rollout/num_states"] == 2, "the two prompts"


def test_rows_that_are_not_valid_are_not_sampled_from():
    valid = np.array([0, 1, 1, 1, 0, 0, 0, 0], bool)
    rows, metrics, _ = run(Vine(num_rollouts=1), roots(valid=valid))
    assert rows.row_data["prefix_known"].any(axis=1).tolist() == valid.tolist()
    nobody, metrics, sampler = run(Vine(num_rollouts=1), roots(valid=np.zeros(8, bool)))
    assert not nobody.row_data["prefix_known"].any() and metrics["rollout/num_states"] == 0 and not sampler.calls


def test_one_prompt_drawn_twice_shares_its_states_and_two_examples_of_one_text_do_not():
    same = roots(prompt_tokens=((7, 7), (7, 7)))
    _, twice, _ = run(Vine(num_rollouts=1), same, example_id=(3, 3))
    _, apart, _ = run(Vine(num_rollouts=1), same, example_id=(3, 5))
    assert twice["rollout/num_states"] < apart["rollout/num_states"]
    args = np.asarray(same.tokens), np.asarray(run(Vine())[0].row_data["step_id"]), np.ones(8, bool)
    found = distinct_states(*args, np.array([3, 3]), None)
    assert found.row[found.step == 0].tolist() == list(range(8)) and len(set(found.index[found.step == 0])) == 1


def test_values_are_in_units_of_the_estimators_total_reward():
    def objective(**settings):
        return config_lib.build(embedded.objective(estimator=fdl.Config(vine, **settings)))

    assert total_weights(objective(), None, 2).tolist() == [1, 1]
    assert total_weights(objective(), (1.0, 0.5), 2).tolist() == [1, 0.5]
    assert total_weights(objective(reward_weights=(2.0, 0.0)), (1.0, 0.5), 2).tolist() == [2, 0]


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    config = forked(fdl.Config(Vine, num_rollouts=2, batch=4), fdl.Config(vine))
    lines = read_metrics(check_resume(config, tmp_path) / "metrics.jsonl")
    lines = [line for line in lines if "vine/frac_known" in line]
    assert len(lines) == 4
    for line in lines:
        assert line["vine/frac_known"] == 1 and line["rollout/num_states"] > 4 and line["actor/grad_norm"] > 0
        assert line["rollout/num_mc_tokens"] >= 2 * line["rollout/num_states"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_rollouts": 0}, "num_rollouts must be at least 1, got 0"),
        ({"max_states": 0}, "max_states must be None or at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        Vine(**settings)


def test_what_cannot_work_is_an_error_when_it_is_built():
    check_refused(forked(None, fdl.Config(vine)), "a method needs prefix_known, prefix_value, step_id, .* a `strategy`")
    with pytest.warns(UserWarning, match="stage 'before': the strategy Vine.* samples for nothing"):
        config_lib.build(forked(fdl.Config(Vine), fdl.Config(grpo)))
    with pytest.raises(ValueError, match=r"the step_boundary of task 'chain_sum' must be a rule .* got None"):
        Vine().check(4, dataclasses.replace(task(), step_boundary=None))
