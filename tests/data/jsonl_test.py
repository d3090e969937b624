"""JSONL data: splits by hash, order, checksums, bad lines named, tasks that the trainer can use."""

import json
import sys
import types

import numpy as np
import pytest

from jentropy.data import jsonl, tokenizer
from jentropy.data.task import jsonl_task
from jentropy.rewards.base import TextReward

ROWS = [{"prompt": f"{a}+{b}=", "answer": a + b, "note": f"n{a}"} for a in range(12) for b in range(10)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "sums.jsonl", ROWS)


def grade(prompts, completions, answer, **fields):
    return [float(completion == str(right)) for completion, right in zip(completions, answer)]


def task(file, **options):
    defaults = {"rewards": TextReward("grade", grade), "max_new_tokens": 4, "data_dir": str(file.parent / "data")}
    return jsonl_task(**{"path": str(file), **defaults, **options})


def test_splits_are_a_partition_in_order(file):
    data = jsonl.prepare(file, heldout_fraction=0.3, data_dir=file.parent / "data")
    train, heldout = (jsonl.rows(data, prefix, "sums") for prefix in ("train", "heldout"))
    assert list(train) == [row for row in ROWS if not jsonl.is_heldout(row["prompt"], 0.3)]
    assert list(heldout) == [row for row in ROWS if jsonl.is_heldout(row["prompt"], 0.3)]
    assert 0.15 < len(heldout) / len(ROWS) < 0.45


def test_a_prompt_is_on_one_side_whatever_surrounds_it():
    assert jsonl.is_heldout("1+1=", 0.6) and not jsonl.is_heldout("1+1=", 0.1)
    sides = [jsonl.is_heldout(str(n), 0.1) for n in range(10_000)]
    assert 0.09 < np.mean(sides) < 0.11


def test_a_directory_has_a_part_per_file(tmp_path):
    write(tmp_path / "easy.jsonl", ROWS[:60])
    write(tmp_path / "hard.jsonl", [row | {"level": 3} for row in ROWS[60:]])
    found = task(tmp_path / "x", path=str(tmp_path))
    assert found.difficulties == ("easy", "hard") and found.difficulty_field == "part"
    batch = found.prompts("train", {"easy": 0.5, "hard": 0.5}).batch(0, 0, 50)
    assert set(batch.fields["part"]) == {"easy", "hard"}
    assert {type(level) for level in batch.fields["level"].tolist()} == {int, type(None)}
    assert set(found.prompts("heldout", {"hard": 1.0}).fixed(0, 5).fields["part"]) == {"hard"}


def test_preparing_again_reads_what_is_there(file):
    options = {"data_dir": file.parent / "data"}
    first = jsonl.prepare(file, **options)
    assert jsonl.prepare(file, **options) == first
    assert first.sources == (("sums.jsonl", jsonl.sha256_of(file)),)
    write(file, [*ROWS, {"prompt": "new", "answer": 0}])
    changed = jsonl.prepare(file, **options)
    assert changed.folder != first.folder and changed.sources != first.sources
    assert not [path for path in (file.parent / "data").rglob(".writing-*")]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip, truncate, lambda path: path.unlink()], ids=["flip", "truncate", "delete"])
def test_damage_to_any_file_is_seen(file, damage):
    data = jsonl.prepare(file, data_dir=file.parent / "data")
    folder = jsonl.pathlib.Path(data.folder)
    contents = {path: path.read_bytes() for path in folder.iterdir()}
    assert len(contents) >= 5
    for path, content in contents.items():
        damage(path)
        with pytest.raises(jsonl.CorruptDataError, match=f"{path.name}.* to have it made anew"):
            jsonl.prepare(file, data_dir=file.parent / "data")
        path.write_bytes(content)
    jsonl.verify(folder)
    assert jsonl.CorruptDataError.exit_code == 65


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2: Expecting property name"),
        ("[1]", "line 2: expected an object, got list"),
        ('{"prompt": "a"}', "line 2: no 'answer'"),
        ('{"answer": 1}', "line 2: no 'prompt'"),
        ('{"prompt": "", "answer": 1}', "line 2: 'prompt' must be a text that is not empty, got ''"),
        ('{"prompt": 3, "answer": 1}', "line 2: 'prompt' must be a text that is not empty, got 3"),
        ('{"prompt": "a", "answer": 1, "response": null}', "line 2: 'response' must be a text"),
        ('{"prompt": "a", "answer": NaN}', "line 2: NaN is no JSON"),
        ('{"prompt": "a", "prompt": "b", "answer": 1}', "line 2: a field occurs twice"),
        ('{"prompt": "a", "answer": 1, "completions": 2}', "line 2: a field must not be called 'completions'"),
        ('{"prompt": "\\ud800", "answer": 1}', "line 2: .*surrogates not allowed"),
        ("[" * 100_000, "line 2: .*recursion"),
        ('{"prompt": "%s", "answer": 1}' % ("a" * 2**20), "line 2: longer than 1048576 bytes"),
    ],
)
def test_bad_lines_are_named(file, line, message):
    file.write_text(json.dumps(ROWS[0]) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"sums.jsonl, {message}"):
        list(jsonl.read_rows(file))


def test_bytes_that_are_no_text(file):
    file.write_bytes(b'\n{"prompt": "\xff", "answer": 1}\n')
    with pytest.raises(ValueError, match=r"sums.jsonl, line 2: 'utf-8' codec"):
        list(jsonl.read_rows(file))


def test_bad_sources(file, tmp_path):
    with pytest.raises(FileNotFoundError, match="no JSONL data at"):
        jsonl.prepare(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match=r"heldout_fraction must be in \(0, 1\), got 1.0"):
        jsonl.prepare(file, heldout_fraction=1.0)
    write(file, ROWS[:1])
    with pytest.raises(ValueError, match="has no held-out prompt among 1 at heldout_fraction = 1e-06"):
        jsonl.prepare(file, heldout_fraction=1e-6, data_dir=tmp_path)


def test_a_task_of_characters(file):
    found = task(file)
    assert found == task(file) and hash(found) == hash(task(file))
    assert found.tokenizer.alphabet == "␀␃+0123456789="
    assert (found.prompt_columns, found.difficulties, found.difficulty_field) == (8, ("sums",), None)
    batch = found.prompts("train", {"sums": 1.0}).batch(0, 3, 16)
    assert batch.tokens.shape == (16, 8) and batch.tokens.dtype == batch.length.dtype == np.int32
    mask = np.arange(8) < batch.length[:, None]
    texts = found.tokenizer.decode_rows(batch.tokens, mask)
    for text, answer, note in zip(texts, batch.fields["answer"], batch.fields["note"]):
        a, b = text.rstrip("=").split("+")
        assert int(a) + int(b) == answer and note == f"n{a}"
    assert batch.fields["answer"].dtype == np.int32 and set(batch.fields) == {"answer", "note", "part"}


def test_the_answer_of_a_completion_is_taken_from_its_text(file):
    found = task(file)
    assert found.answer_id is None and found.has_answers
    assert found.final_answer is not None and found.final_answer("so the answer is 42.") == "42"


def test_the_bucket(file):
    assert task(file, prompt_columns=5).prompt_columns == 5
    with pytest.raises(ValueError, match=r"train_sums: prompt of row \d+ has 5 tokens, not 1 to 4"):
        task(file, prompt_columns=4).prompts("train", {"sums": 1.0})


def test_demonstrations_follow_their_prompt(file):
    write(file, [row | {"response": str(row["answer"])} for row in ROWS])
    found = task(file)
    rows = found.demonstrations({"sums": 1.0}).batch(0, 0, 64)
    assert rows.tokens.shape == rows.weight.shape == (64, 12)
    for tokens, weight in zip(rows.tokens, rows.weight):
        text = "".join(found.tokenizer.alphabet[token] for token in tokens).rstrip("␀")
        left, right = text.split("=")
        assert text.endswith("␃") and sum(map(int, left.split("+"))) == int(right[:-1])
        np.testing.assert_array_equal(weight, (np.arange(12) > len(left)) & (np.arange(12) < len(text)))


def test_no_demonstrations(file):
    with pytest.raises(ValueError, match=r"split 'sums' has weight 1\.0 but no example"):
        task(file).demonstrations({"sums": 1.0})


def test_a_response_that_does_not_fit(file):
    write(file, [row | {"response": "12345"} for row in ROWS])
    with pytest.raises(ValueError, match="train_sums: response of row 0 has 6 tokens, not 1 to 4"):
        task(file).demonstrations({"sums": 1.0})


def test_bad_arguments(file):
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        task(file, max_new_tokens=0)
    with pytest.raises(ValueError, match=r"rewards must be at least one, got \(\)"):
        task(file, rewards=())
    with pytest.raises(ValueError, match=r"in a file that exists, got 'absent\.py:grade'"):
        task(file, rewards=["absent.py:grade"])


class Words:
    """What the package `tokenizers` offers, for a vocabulary of words."""

    def __init__(self, vocabulary):
        self._vocabulary = vocabulary

    @classmethod
    def from_str(cls, text):
        return cls(json.loads(text)["model"]["vocab"])

    def get_vocab(self, with_added_tokens):
        assert with_added_tokens
        return self._vocabulary

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return types.SimpleNamespace(ids=[self._vocabulary[word] for word in text.split()])

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        words = {i: word for word, i in self._vocabulary.items()}
        return " ".join(words[i] for i in ids if not words[i].startswith("<"))


@pytest.fixture
def words(tmp_path, monkeypatch):
    """A `tokenizer.json`, and a stand-in for the package that reads it."""
    monkeypatch.setitem(sys.modules, "tokenizers", types.SimpleNamespace(Tokenizer=Words))
    vocabulary = {"one": 0, "and": 1, "two": 2, "<pad>": 3, "</s>": 9}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": {"vocab": vocabulary}}))
    return path


def test_a_tokenizer_file(words):
    found = tokenizer.file_tokenizer(words)
    assert (found.vocab_size, found.pad_id, found.eos_id) == (10, 3, 9)
    assert found == tokenizer.file_tokenizer(words.parent)
    np.testing.assert_array_equal(found.encode("two and one"), np.asarray([2, 1, 0], np.int32))
    tokens, mask = np.asarray([[2, 1, 9, 3], [0, 9, 3, 3]]), np.asarray([[True] * 3 + [False], [True] * 4])
    assert found.decode_rows(tokens, mask) == ["two and", "one"]
    assert tokenizer.file_tokenizer(words, eos="two", pad="one").pad_id == 0
    (words.parent / "tokenizer_config.json").write_text('{"eos_token": {"content": "and"}}')
    assert tokenizer.file_tokenizer(words).eos_id == 1


def test_a_task_with_a_tokenizer_file(words):
    write(words.parent / "sums.jsonl", [{"prompt": "one and" + " two" * n, "answer": n} for n in range(40)])
    found = task(words.parent / "sums.jsonl", tokenizer=str(words))
    assert found.prompt_columns == 48 and hash(found)
    assert found.prompts("train", {"sums": 1.0}).batch(0, 0, 4).tokens.shape == (4, 48)


def test_bad_tokenizer_files(words, monkeypatch):
    with pytest.raises(ValueError, match="eos must be a token of the vocabulary, got 'x'"):
        tokenizer.file_tokenizer(words, eos="x")
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        tokenizer.file_tokenizer(words.with_name("absent.json"))
    words.write_text('{"model": {"vocab": {"one": 0}}}')
    with pytest.raises(ValueError, match="no usual end-of-sequence token: name it with eos"):
        tokenizer.file_tokenizer(words)
    words.write_text("{")
    with pytest.raises(ValueError, match=r"is not a tokenizer.json"):
        tokenizer.file_tokenizer(words)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    words.write_text("{}")
    with pytest.raises(ImportError, match=r"needs the package tokenizers: pip install 'jentropy\[hf\]'"):
        tokenizer.file_tokenizer(words)


def test_a_tokenizer_file_that_changes(words):
    found = tokenizer.file_tokenizer(words)
    words.write_text('{"model": {"vocab": {"one": 0}}}')
    tokenizer._load.cache_clear()
    with pytest.raises(ValueError, match="has changed: its sha256 is not"):
        found.encode("one")


def test_characters_that_stand_for_themselves():
    found = tokenizer.char_tokenizer(["ab", "ba"])
    assert (found.alphabet, found.pad_id, found.eos_id) == ("␀␃ab", 0, 1)
    assert found.decode_rows(np.asarray([[2, 3, 1, 0, 9]]), np.ones((1, 5), bool)) == ["ab\ufffd"]
    with pytest.raises(ValueError, match="without the characters of padding and end"):
        tokenizer.char_tokenizer(["␀"])
    with pytest.raises(ValueError, match="texts must be not empty"):
        tokenizer.char_tokenizer([""])
