"""Pairs of responses in JSONL files: what a row must hold, held-out prompts left out, batches for the trainer."""

import json

import numpy as np
import pytest

from jentropy.data import jsonl
from jentropy.data.task import jsonl_task
from jentropy.rewards.base import TextReward

PROMPTS = [{"prompt": f"{a}+{b}=", "answer": a + b} for a in range(12) for b in range(10)]
PAIRS = [
    {"prompt": row["prompt"], "chosen": str(row["answer"]), "rejected": f"{row['answer'] + 1}!", "source": "ours"}
    for row in PROMPTS
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def grade(prompts, completions, answer, **fields):
    return [float(completion == str(right)) for completion, right in zip(completions, answer)]


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "pairs.jsonl", PAIRS)


def task(file, **options):
    sums = write(file.parent / "sums.txt", PROMPTS)
    defaults = {"rewards": TextReward("grade", grade), "max_new_tokens": 5, "data_dir": str(file.parent / "data")}
    return jsonl_task(**{"path": str(sums), "preferences": str(file), **defaults, **options})


def test_a_batch_holds_both_responses_behind_the_prompt(file):
    found = task(file, heldout_fraction=0.3)
    assert found == task(file, heldout_fraction=0.3) and hash(found) == hash(task(file, heldout_fraction=0.3))
    assert (found.pair_splits, found.difficulties) == (("pairs",), ("sums",))
    assert "!" in found.tokenizer.alphabet, "texts of pairs make the alphabet, too"
    assert [name for name, _ in found.sources] == ["sums.txt", "pairs.jsonl"]
    batch = found.preferences({"pairs": 1.0}).batch(0, 0, 40)
    assert batch.tokens.shape == (80, found.prompt_columns + 5)
    column = np.arange(batch.tokens.shape[1])[None, :]
    prompts = found.tokenizer.decode_rows(batch.tokens, column < batch.prompt_length[:, None])
    texts = found.tokenizer.decode_rows(batch.tokens, batch.mask)
    right = {row["prompt"]: row["answer"] for row in PROMPTS}
    for chosen, rejected in zip(range(0, 80, 2), range(1, 80, 2)):
        assert prompts[chosen] == prompts[rejected] and not jsonl.is_heldout(prompts[chosen], 0.3)
        assert texts[chosen] == str(right[prompts[chosen]]) and texts[rejected] == f"{right[prompts[chosen]] + 1}!"
    last = batch.tokens[np.arange(80), batch.prompt_length + batch.mask.sum(axis=1) - 1]
    assert (last == found.tokenizer.eos_id).all()


def test_pairs_have_no_heldout_split_and_a_dataset_of_their_own(file):
    data = jsonl.prepare(file, heldout_fraction=0.3, data_dir=file.parent / "data", kind=jsonl.PAIRS)
    assert data.splits == (("train", "pairs"),)
    kept = [row for row in PAIRS if not jsonl.is_heldout(row["prompt"], 0.3)]
    assert list(jsonl.rows(data, "train", "pairs")) == kept and 0 < len(kept) < len(PAIRS)
    assert jsonl.prepare(file, heldout_fraction=0.3, data_dir=file.parent / "data", kind=jsonl.PAIRS) == data
    with pytest.raises(ValueError, match="line 1: no 'answer'"):
        jsonl.prepare(file, heldout_fraction=0.3, data_dir=file.parent / "data")
    write(file, [{**row, "answer": 0} for row in PAIRS])
    both = {jsonl.prepare(file, data_dir=file.parent / "data", kind=kind).folder for kind in (jsonl.PAIRS, "prompts")}
    assert len(both) == 2


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"prompt": "a", "chosen": "b"}', "line 2: no 'rejected'; it has"),
        ('{"prompt": "a", "rejected": "b"}', "line 2: no 'chosen'; it has"),
        ('{"chosen": "a", "rejected": "b"}', "line 2: no 'prompt'; it has"),
        (
            '{"prompt": "a", "chosen": "b", "rejected": "b"}',
            "line 2: 'chosen' and 'rejected' are the same text",
        ),
        (
            '{"prompt": "a", "chosen": "b", "rejected": ""}',
            "line 2: 'rejected' must be a text that is not empty",
        ),
        ('{"prompt": "a", "chosen": ["b"], "rejected": "c"}', "line 2: 'chosen' must be a text that is not empty"),
        ("{", "line 2: Expecting property name"),
    ],
)
def test_bad_lines_are_named(file, line, message):
    file.write_text(json.dumps(PAIRS[0]) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"pairs.jsonl, {message}"):
        jsonl.prepare(file, data_dir=file.parent / "data", kind=jsonl.PAIRS)


def test_a_file_of_heldout_prompts_only_is_refused(file):
    write(file, [row for row in PAIRS if jsonl.is_heldout(row["prompt"], 0.3)])
    with pytest.raises(ValueError, match=r"pairs.jsonl has no training prompt among \d+ at heldout_fraction = 0.3"):
        task(file, heldout_fraction=0.3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_new_tokens": 3}, "train_pairs: rejected of row .* has 4 tokens, not 1 to 3"),
        ({"prompt_columns": 4}, "train_pairs: prompt of row .* has 5 tokens, not 1 to 4"),
    ],
)
def test_what_does_not_fit_is_named(file, options, message):
    with pytest.raises(ValueError, match=message):
        task(file, **options).preferences({"pairs": 1.0})


class Lower:
    """A tokenizer that does not tell cases apart."""

    pad_id, eos_id, vocab_size = 0, 1, 130

    def encode(self, text):
        return np.asarray([ord(letter) for letter in text.lower()], np.int32)


def test_responses_of_the_same_tokens_are_named(file):
    write(file, [*PAIRS, {"prompt": "1+1=", "chosen": "B", "rejected": "b"}])
    with pytest.raises(ValueError, match=r"train_pairs: chosen and rejected of row \d+ have the same tokens"):
        task(file, tokenizer=Lower()).preferences({"pairs": 1.0})


def test_a_task_without_pairs_says_so(file):
    found = task(file, preferences=None)
    assert [name for name, _ in found.sources] == ["sums.txt"]
    with pytest.raises(ValueError, match="task 'sums' has no pairs of responses to learn preferences from"):
        found.preferences({"pairs": 1.0})
