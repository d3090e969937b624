"""Chained addition with two strategies: a small task on which policies of 0.1 M parameters show entropy collapse.

A prompt is n digits (2 <= n <= 6), left-aligned, padded on the right to 6 slots, then `=`: 7 tokens. The answer is
their sum mod 10. Two responses are legal: direct, `D a EOS`, which a small policy can only learn for two digits,
and step by step, `S p2 .. pn EOS`, with p_k the running sum mod 10 of the first k digits.

Three builder configs:

* `prompts`: splits `train_2 .. train_6` and `heldout_2 .. heldout_6`, one per number of digits. Two and three digits
  are enumerated completely, for more digits distinct prompts are sampled.
* `demonstrations`: splits `train_2 .. train_6` of noisy responses to training prompts. Half are step by step, with
  each step wrong with probability 0.2 (the error propagates); half direct, wrong with probability 0.05.

* `exit_demonstrations`: splits `train_2 .. train_6` of responses that can be stopped, `S p2 .. pn pn .. pn X a EOS`:
  the thought goes on for 2 to 6 tokens after the result is there, which is good for nothing; then the exit token and
  the answer. A quarter stop at a random place of the thought before, and answer with the digit reached there, so that
  a policy knows how to answer at any place.

A prompt is held out if (Σ_i d_i q_i + n) mod 5 = 0, with fixed primes q. Pairs are ordered: `12` may be held out
while `21` is not.
"""

import functools
import os
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from jentropy.data import storage
from jentropy.data.tokenizer import CHAIN_SUM as TOKENIZER
from jentropy.data.tokenizer import CHAIN_SUM_EXITS as EXIT_TOKENIZER

PAD, EQUALS, DIRECT, STEPS, EOS = (int(token) for token in TOKENIZER.encode("_=DS|"))
EXIT = int(EXIT_TOKENIZER.encode("X")[0])
NUM_DIGITS = (2, 3, 4, 5, 6)
PROMPT_LENGTH = 7
RESPONSE_LENGTH = 7
EXIT_RESPONSE_LENGTH = 16

_SLOTS = 6
_PRIMES = (3, 7, 11, 13, 17, 19)  # not all equal mod 5: the split says nothing about the answer
_SEED = 20250527
_NUM_SAMPLED = 7_500
_NUM_DEMONSTRATIONS = 8_000
_STEP_NOISE = 0.2
_DIRECT_NOISE = 0.05
_REPEATS = (2, 6)
_EARLY = 0.25


def is_heldout(digits: np.ndarray) -> np.ndarray:
    """Whether each prompt is held out: (Σ_i d_i q_i + n) mod 5 = 0.

    Args:
      digits: `[N, n]` integers in 0..9.

    Returns:
      `[N]` bool.
    """
    num_digits = digits.shape[1]
    return (digits @ np.asarray(_PRIMES[:num_digits]) + num_digits) % 5 == 0


def prompt_digits(num_digits: int) -> np.ndarray:
    """The digits `[N, n]` of every prompt of the task with `num_digits` digits, both splits, in a fixed order."""
    total = 10**num_digits
    numbers = np.arange(total)
    if total > _NUM_SAMPLED:
        numbers = np.random.default_rng([_SEED, num_digits]).permutation(total)[:_NUM_SAMPLED]
    return numbers[:, None] // 10 ** np.arange(num_digits - 1, -1, -1) % 10


def encode_prompts(digits: np.ndarray) -> dict[str, np.ndarray]:
    """The features of prompts with digits `[N, n]`: `prompt` `[N, 7]`, `answer` `[N]`, `num_digits` `[N]`, int32."""
    rows, num_digits = digits.shape
    prompt = np.full((rows, PROMPT_LENGTH), PAD, np.int32)
    prompt[:, :num_digits] = digits
    prompt[:, _SLOTS] = EQUALS
    answer = (digits.sum(axis=1) % 10).astype(np.int32)
    return {"prompt": prompt, "answer": answer, "num_digits": np.full(rows, num_digits, np.int32)}


def demonstrate(digits: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Noisy responses to prompts with digits `[N, n]`.

    Args:
      digits: `[N, n]` integers in 0..9.
      rng: generator; advanced.

    Returns:
      `response` `[N, 7]`, padded on the right, `response_length` `[N]` with EOS, `strategy` `[N]` (0 direct, 1 step by
      step), all int32.
    """
    rows, num_digits = digits.shape
    steps = np.full((rows, RESPONSE_LENGTH), PAD, np.int32)
    steps[:, 0], steps[:, num_digits] = STEPS, EOS
    value = digits[:, 0]
    for i in range(1, num_digits):
        value = _corrupt((value + digits[:, i]) % 10, _STEP_NOISE, rng)
        steps[:, i] = value
    direct = np.full((rows, RESPONSE_LENGTH), PAD, np.int32)
    direct[:, 0], direct[:, 2] = DIRECT, EOS
    direct[:, 1] = _corrupt(digits.sum(axis=1) % 10, _DIRECT_NOISE, rng)
    strategy = rng.permutation(rows) % 2
    return {
        "response": np.where(strategy[:, None] == 1, steps, direct),
        "response_length": np.where(strategy == 1, num_digits + 1, 3).astype(np.int32),
        "strategy": strategy.astype(np.int32),
    }


def demonstrate_exits(digits: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Responses with an exit to prompts with digits `[N, n]`: steps as noisy as those of `demonstrate`.

    Args:
      digits: `[N, n]` integers in 0..9.
      rng: generator; advanced.

    Returns:
      `response` `[N, 16]`, `response_length` `[N]` with EOS, `strategy` `[N]`, always 1, all int32.
    """
    rows, num_digits = digits.shape
    reached = np.zeros((rows, EXIT_RESPONSE_LENGTH), np.int32)  # after each token of the thought
    reached[:, 0] = digits[:, 0]
    for i in range(1, num_digits):
        reached[:, i] = _corrupt((reached[:, i - 1] + digits[:, i]) % 10, _STEP_NOISE, rng)
    reached[:, num_digits:] = reached[:, num_digits - 1 : num_digits]
    length = num_digits + rng.integers(_REPEATS[0], _REPEATS[1] + 1, rows)
    length = np.where(rng.random(rows) < _EARLY, (rng.random(rows) * length).astype(np.int64) + 1, length)[:, None]
    thought = np.concatenate([np.full((rows, 1), STEPS, np.int32), reached[:, 1:]], axis=1)
    answer = np.take_along_axis(reached, length - 1, axis=1)
    place = np.arange(EXIT_RESPONSE_LENGTH)[None, :] - length
    rest = [place == 0, place == 1, place == 2, place > 2]
    return {
        "response": np.select(rest, [EXIT, answer, EOS, PAD], thought).astype(np.int32),
        "response_length": (length[:, 0] + 3).astype(np.int32),
        "strategy": np.ones(rows, np.int32),
    }


def _corrupt(digit: np.ndarray, probability: float, rng: np.random.Generator) -> np.ndarray:
    """Replaces each digit `[N]`, with the given probability, by a uniform other digit."""
    wrong = rng.random(len(digit)) < probability
    return np.where(wrong, (digit + rng.integers(1, 10, len(digit))) % 10, digit)


class ChainSum(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of the task; records are stored as array_record, in a fixed order."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # nothing is downloaded, so TFDS need not look for a checksum file beside the source
    BUILDER_CONFIGS = [  # noqa: RUF012 - the name and type that TFDS asks for
        tfds.core.BuilderConfig(name="prompts", description="Prompts and answers, train and held-out."),
        tfds.core.BuilderConfig(name="demonstrations", description="Noisy responses to training prompts."),
        tfds.core.BuilderConfig(name="exit_demonstrations", description="Responses with an exit, not the shortest."),
    ]

    def _has_responses(self) -> bool:
        return self.builder_config is not None and self.builder_config.name != "prompts"

    def _has_exits(self) -> bool:
        return self.builder_config is not None and self.builder_config.name == "exit_demonstrations"

    def _info(self) -> tfds.core.DatasetInfo:
        tokens = functools.partial(tfds.features.Tensor, dtype=np.int32)
        features = {
            "prompt": tokens(shape=(PROMPT_LENGTH,)),
            "answer": tfds.features.Scalar(dtype=np.int32),
            "num_digits": tfds.features.Scalar(dtype=np.int32),
        }
        if self._has_responses():
            features["response"] = tokens(shape=(EXIT_RESPONSE_LENGTH if self._has_exits() else RESPONSE_LENGTH,))
            features["response_length"] = tfds.features.Scalar(dtype=np.int32)
            features["strategy"] = tfds.features.Scalar(dtype=np.int32)
        return tfds.core.DatasetInfo(
            builder=self,
            description="Chained addition modulo 10 with two response strategies.",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager
        train = {f"train_{n}": self._generate_examples(n, heldout=False) for n in NUM_DIGITS}
        if self._has_responses():
            return train
        return train | {f"heldout_{n}": self._generate_examples(n, heldout=True) for n in NUM_DIGITS}

    def _generate_examples(self, num_digits: int, *, heldout: bool) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        digits = prompt_digits(num_digits)
        digits = digits[is_heldout(digits) == heldout]
        arrays = {}
        if self._has_responses():
            digits = digits[np.arange(_NUM_DEMONSTRATIONS) % len(digits)]
            if self._has_exits():
                arrays = demonstrate_exits(digits, np.random.default_rng([_SEED, num_digits, 2]))
            else:
                arrays = demonstrate(digits, np.random.default_rng([_SEED, num_digits, 1]))
        arrays |= encode_prompts(digits)
        for i in range(len(digits)):
            yield i, {name: array[i] for name, array in arrays.items()}


def prepare(config: str, data_dir: str | os.PathLike | None = None) -> tfds.core.DatasetBuilder:
    """Writes a config ("prompts", ...) unless it is there and returns its reader."""
    return storage.prepare(ChainSum, config, data_dir)


def split_arrays(config: str, split: str, data_dir: str | os.PathLike | None = None) -> storage.Arrays:
    """One split as read-only int32 arrays by feature name; see `storage.split_arrays`.

    Args:
      config: "prompts", "demonstrations" or "exit_demonstrations".
      split: such as "train_2" or "heldout_6".
      data_dir: folder of all datasets; None for `storage.default_data_dir()`.
    """
    return storage.split_arrays(ChainSum, config, split, data_dir)


def exit_split_arrays(config: str, split: str, data_dir: str | os.PathLike | None = None) -> storage.Arrays:
    """The same of the task with exits: its "demonstrations" are those of the config `exit_demonstrations`."""
    return split_arrays("exit_demonstrations" if config == "demonstrations" else config, split, data_dir)
