"""The prepared dataset: contents, split, noise, storage; and no TensorFlow anywhere."""

import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from jentropy.data import chain_sum, storage

_PREPARE = """
import sys, time
from jentropy.data import chain_sum
begin = time.process_time()
for config in ("prompts", "demonstrations"):
    chain_sum.prepare(config, sys.argv[1])
seconds = time.process_time() - begin
chain_sum.split_arrays("prompts", "train_2", sys.argv[1])
assert "tensorflow" not in sys.modules
print(seconds)
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> tuple[str, float]:
    """Both configs, prepared in a fresh process: the folder, and the CPU seconds it took."""
    folder = str(tmp_path_factory.mktemp("data"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    output = subprocess.run(
        [sys.executable, "-c", _PREPARE, folder], env=environment, capture_output=True, text=True, check=True
    )
    return folder, float(output.stdout)


def test_preparation_is_quick_and_silent_and_needs_no_tensorflow(prepared):
    assert prepared[1] < 20


@pytest.mark.parametrize("num_digits", chain_sum.NUM_DIGITS)
def test_prompts(prepared, num_digits):
    splits = {name: chain_sum.split_arrays("prompts", f"{name}_{num_digits}", prepared[0]) for name in _SPLITS}
    for name, arrays in splits.items():
        prompt = arrays["prompt"]
        assert prompt.dtype == np.int32 and prompt.shape[1] == 7
        digits = prompt[:, :num_digits]
        assert ((digits >= 0) & (digits <= 9)).all()
        assert (prompt[:, num_digits:6] == chain_sum.PAD).all() and (prompt[:, 6] == chain_sum.EQUALS).all()
        np.testing.assert_array_equal(arrays["answer"], digits.sum(axis=1) % 10)
        assert (arrays["num_digits"] == num_digits).all()
        assert (chain_sum.is_heldout(digits) == (name == "heldout")).all()
        assert set(arrays["answer"]) == set(range(10))
    rows = [tuple(row) for arrays in splits.values() for row in arrays["prompt"].tolist()]
    assert len(set(rows)) == len(rows)  # distinct, hence train and held-out are disjoint
    assert len(rows) == min(10**num_digits, 7_500)
    assert 0.19 < len(splits["heldout"]["prompt"]) / len(rows) < 0.21


_SPLITS = ("train", "heldout")


def test_heldout_hash_by_hand():
    # 3 * 1 + 7 * 2 + 2 = 19 and 3 * 2 + 7 * 1 + 2 = 15
    np.testing.assert_array_equal(chain_sum.is_heldout(np.array([[1, 2], [2, 1]])), [False, True])


@pytest.mark.parametrize("num_digits", chain_sum.NUM_DIGITS)
def test_demonstrations(prepared, num_digits):
    arrays = chain_sum.split_arrays("demonstrations", f"train_{num_digits}", prepared[0])
    digits, response = arrays["prompt"][:, :num_digits], arrays["response"]
    is_steps = arrays["strategy"] == 1
    assert is_steps.mean() == 0.5
    assert not chain_sum.is_heldout(digits).any()
    np.testing.assert_array_equal(arrays["response_length"], np.where(is_steps, num_digits + 1, 3))
    end = np.argmax(response == chain_sum.EOS, axis=1)
    np.testing.assert_array_equal(end + 1, arrays["response_length"])
    assert (response[np.arange(7) > end[:, None]] == chain_sum.PAD).all()
    np.testing.assert_array_equal(response[:, 0], np.where(is_steps, chain_sum.STEPS, chain_sum.DIRECT))

    direct_is_wrong = (response[:, 1] != arrays["answer"])[~is_steps]
    assert abs(direct_is_wrong.mean() - 0.05) < 0.015
    value = np.concatenate([digits[:, :1], response[:, 1:num_digits]], axis=1)[is_steps]
    step_is_wrong = value[:, 1:] != (value[:, :-1] + digits[is_steps, 1:]) % 10
    assert np.abs(step_is_wrong.mean(axis=0) - 0.2).max() < 0.03


def test_generation_is_deterministic(prepared):
    digits = chain_sum.prompt_digits(5)
    again = chain_sum.encode_prompts(digits[~chain_sum.is_heldout(digits)])
    stored = chain_sum.split_arrays("prompts", "train_5", prepared[0])
    assert stored.keys() == again.keys()
    for name in stored:
        np.testing.assert_array_equal(stored[name], again[name])


def test_tfds_reads_the_same_records(prepared):
    arrays = chain_sum.split_arrays("demonstrations", "train_3", prepared[0])
    source = chain_sum.prepare("demonstrations", prepared[0]).as_data_source("train_3")
    assert len(source) == len(arrays["prompt"])
    for row in (0, 1, 4321, len(source) - 1):
        for name, value in source[row].items():
            np.testing.assert_array_equal(arrays[name][row], value)


def test_arrays_are_read_only_and_read_once(prepared):
    first = chain_sum.split_arrays("prompts", "train_2", prepared[0])
    second = chain_sum.split_arrays("prompts", "train_2", pathlib.Path(prepared[0]))
    assert first["prompt"] is second["prompt"]
    with pytest.raises(ValueError, match="read-only"):
        first["prompt"][0] = 0


def test_preparing_again_writes_nothing(prepared, monkeypatch):
    monkeypatch.setattr(storage, "_write", lambda *arguments: pytest.fail("wrote again"))
    assert chain_sum.prepare("prompts", prepared[0]).info.splits["train_2"].num_examples == 80


def test_another_process_may_be_faster(prepared, tmp_path, monkeypatch):
    def lose_the_race(builder, config, data_dir):
        shutil.copytree(prepared[0], data_dir, dirs_exist_ok=True)
        raise OSError("Directory not empty")

    monkeypatch.setattr(storage, "_write", lose_the_race)
    assert chain_sum.prepare("prompts", tmp_path).info.splits["heldout_2"].num_examples == 20


def test_interrupted_preparation_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(digits):
        raise KeyboardInterrupt

    monkeypatch.setattr(chain_sum, "encode_prompts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        chain_sum.prepare("prompts", tmp_path)
    assert not list((tmp_path / "chain_sum").rglob("*incomplete*"))
    assert not list((tmp_path / "chain_sum").rglob("dataset_info.json"))


def test_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write the dataset chain_sum/prompts to .*file/data .*JENTROPY_DATA"):
        chain_sum.prepare("prompts", tmp_path / "file" / "data")


def test_unknown_config_and_split(prepared):
    with pytest.raises(ValueError, match=r"config must be one of .* got 'prompt'"):
        chain_sum.prepare("prompt", prepared[0])
    with pytest.raises(ValueError, match=r"split must be one of .* got 'train_7'"):
        chain_sum.split_arrays("prompts", "train_7", prepared[0])


def test_default_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("JENTROPY_DATA", "/some/where")
    assert storage.default_data_dir() == pathlib.Path("/some/where")
    monkeypatch.delenv("JENTROPY_DATA")
    assert storage.default_data_dir() == pathlib.Path.home() / ".cache/jentropy/data"


def test_responses_with_exits_go_on_after_the_result_and_can_be_stopped_anywhere():
    digits = chain_sum.prompt_digits(4)[:4000]
    found = chain_sum.demonstrate_exits(digits, np.random.default_rng(0))
    early = right = 0
    for prompt, response, length in zip(digits, found["response"], found["response_length"]):
        text = chain_sum.EXIT_TOKENIZER.decode(response)
        assert text.index("|") == length - 1 and set(text[length:]) <= {"_"}
        thought, answer = text[: length - 1].split("X")
        reached = [str(prompt[0]), *thought[1:]]
        assert thought[0] == "S" and answer == reached[-1] and len(thought) <= 10
        assert len(set(reached[3:])) <= 1, "behind the result it is repeated"
        early += len(thought) < 6
        right += len(thought) >= 4 and answer == str(prompt.sum() % 10)
    assert 0.1 < early / 4000 < 0.25 and 0.4 < right / 4000 < 0.65
    assert (found["strategy"] == 1).all() and found["response"].shape == (4000, chain_sum.EXIT_RESPONSE_LENGTH)
