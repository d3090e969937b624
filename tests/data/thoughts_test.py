"""Which tokens are a thought, by hand."""

import functools

import numpy as np
import pytest

from jentropy.data.task import chain_sum_exits_task, chain_sum_task, jsonl_task
from jentropy.data.thoughts import BeforeMarker
from jentropy.rewards.base import DeviceReward
from jentropy.rewards.chain_sum import exit_tokens


def test_the_thought_ends_before_the_first_marker_of_the_response():
    tokens = np.array([[5, 1, 2, 5, 3, 5], [1, 2, 3, 4, 5, 5], [1, 1, 1, 1, 5, 5], [1, 2, 5, 5, 5, 5]], np.int32)
    mask = np.array([[0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]], bool)
    one = np.asarray(BeforeMarker((5,))(tokens, mask))
    assert one.astype(int).tolist() == [[0, 1, 1, 0, 0, 0], [0] * 6, [0, 0, 1, 1, 0, 0], [0] * 6]
    two = np.asarray(BeforeMarker((5, 3))(tokens, mask))
    assert two.astype(int).tolist() == [[0, 1, 1, 0, 0, 0], [0] * 6, [0] * 6, [0] * 6]
    assert not np.asarray(BeforeMarker((5, 5))(tokens, mask))[:3].any(), "a marker lies inside the response"
    with pytest.raises(ValueError, match="marker must be at least one token"):
        BeforeMarker(())


def test_chained_addition_has_thoughts_if_it_has_exits():
    plain, task = chain_sum_task(), chain_sum_exits_task()
    assert plain.thought is None and plain.exit_inducer == () and task == chain_sum_exits_task() != plain
    assert task.tokenizer.vocab_size == plain.tokenizer.vocab_size
    text = "12____=S333X3|"
    tokens, mask = task.tokenizer.encode(text)[None, :], (np.arange(14) >= 7)[None, :]
    shown = np.asarray(task.thought(tokens, mask))[0]
    assert "".join(letter for letter, is_thought in zip(text, shown) if is_thought) == "S333"
    assert task.tokenizer.decode(task.exit_inducer) == "X"
    with pytest.raises(ValueError, match=r"reward must be one of .* got 'device.chain'"):
        chain_sum_exits_task(reward="device+chain")


def test_an_answer_counts_behind_the_exit_alone():
    task, text = chain_sum_exits_task(), chain_sum_exits_task(reward="text")
    responses = ["S33X3|", "SX3|", "S333|", "S33X4|", "S33X3", "X3|", "S3X33|", "|", "SX33X3|"]
    tokens = np.stack([task.tokenizer.encode(f"12____={r:_<8}") for r in responses])
    mask = np.arange(15)[None, :] < 7 + np.array([len(r) for r in responses])[:, None]
    mask &= np.arange(15)[None, :] >= 7
    answer = np.full(len(responses), 3, np.int32)
    found = np.asarray(task.rewards[0].function(tokens, mask, {"answer": answer}))
    assert found.tolist() == [1, 1, 0, 0, 0, 1, 0, 0, 1]
    assert text.rewards[0].function([""] * 9, responses, answer=answer.tolist()) == found.tolist()


def test_own_data_say_how_a_thought_ends_and_how_an_answer_is_asked_for(tmp_path):
    rows = (f'{{"prompt": "{"a" * n}b", "answer": "b"}}\n' for n in range(1, 20))
    (tmp_path / "data.jsonl").write_text("".join(rows))
    build = functools.partial(
        jsonl_task, path=str(tmp_path / "data.jsonl"), rewards=DeviceReward("none", exit_tokens), max_new_tokens=9,
        data_dir=str(tmp_path), heldout_fraction=0.5,
    )  # fmt: skip
    assert build().thought is None and build().exit_inducer == ()
    task = build(thought_end="#>", exit_inducer="!#>\n")
    assert task.tokenizer.decode(task.exit_inducer) == "!#>\n"
    tokens = task.tokenizer.encode("ab#a#>b")[None, :]
    assert np.asarray(task.thought(tokens, np.ones((1, 7), bool)))[0].tolist() == [True] * 4 + [False] * 3
    for wrong in ({"thought_end": "#>"}, {"exit_inducer": "#>"}):
        with pytest.raises(ValueError, match="exit_inducer must be given if and only if thought_end is"):
            build(**wrong)
