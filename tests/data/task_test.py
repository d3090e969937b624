"""Tasks: value equality, mixtures, the prompt bucket."""

import dataclasses

import numpy as np
import pytest

from jentropy.data import chain_sum, task
from jentropy.rewards import answers


def _split_arrays(config: str, split: str, data_dir: str | None) -> dict[str, np.ndarray]:
    """A few rows of chained addition, in memory."""
    del data_dir
    digits = chain_sum.prompt_digits(int(split[-1]))[:50]
    arrays = chain_sum.encode_prompts(digits)
    return arrays if config == "prompts" else arrays | chain_sum.demonstrate(digits, np.random.default_rng(0))


def _task(**changes) -> task.Task:
    return dataclasses.replace(task.chain_sum_task(), split_arrays=_split_arrays, **changes)


def test_tasks_are_values():
    assert task.chain_sum_task() == task.chain_sum_task()
    assert hash(task.chain_sum_task(data_dir="x")) == hash(task.chain_sum_task(data_dir="x"))
    assert task.chain_sum_task(reward="text") != task.chain_sum_task(reward="device")


def test_rewards_by_name():
    names = {
        option: [reward.name for reward in task.chain_sum_task(reward=option).rewards]
        for option in ("device", "text", "device+chain", "text+chain")
    }
    both = ["chain_sum", "legal_chain"]
    assert names == {"device": both[:1], "text": both[:1], "device+chain": both, "text+chain": both}
    assert task.chain_sum_task().rewards == task.chain_sum_task(reward="device").rewards


def test_tasks_say_what_the_answer_of_a_response_is():
    assert _task().answer_id is answers.chain_sum_id and _task().has_answers
    assert not _task(answer_id=None).has_answers
    assert _task(answer_id=None, final_answer=answers.final_answer).has_answers


def test_unknown_reward_and_prefix():
    with pytest.raises(ValueError, match=r"reward must be one of .* got 'host'"):
        task.chain_sum_task(reward="host")
    with pytest.raises(ValueError, match="split_prefix must be 'train' or 'heldout', got 'test'"):
        _task().prompts("test", {2: 1.0})


def test_easy_mixture():
    assert task.easy_mixture(1.0) == {2: 1.0, 3: 0.0, 4: 0.0, 5: 0.0, 6: 0.0}
    assert task.easy_mixture(0.6)[3] == pytest.approx(0.1)
    with pytest.raises(ValueError, match=r"easy must be in \[0, 1\], got 1.5"):
        task.easy_mixture(1.5)


def test_prompts_and_demonstrations():
    prompts = _task().prompts("heldout", task.easy_mixture(1.0)).batch(0, 0, 8)
    assert prompts.tokens.shape == (8, 7)
    assert set(prompts.fields) == {"answer", "num_digits"}
    assert (prompts.fields["num_digits"] == 2).all()
    rows = _task().demonstrations(task.easy_mixture(0.2), strategy_prior=0.5).batch(0, 0, 8)
    assert rows.tokens.shape == rows.weight.shape == (8, 14)


def test_prompts_fill_the_bucket():
    prompts = _task(prompt_columns=9).prompts("train", task.easy_mixture(0.5)).batch(0, 0, 8)
    assert prompts.tokens.shape == (8, 9)
    assert (prompts.tokens[:, 7:] == chain_sum.PAD).all()


def test_prompt_longer_than_the_bucket():
    with pytest.raises(ValueError, match="a prompt of 7 tokens does not fit the bucket of 6 tokens"):
        _task(prompt_columns=6).prompts("train", task.easy_mixture(0.5))
