"""Preferences of chained addition (`data/chain_sum.py`): the right chain against one with a wrong step.

To a training prompt both responses are step by step, `S p2 .. pn EOS`, and equally long. The rejected one slips once,
at a step that is drawn uniformly, by a digit that is drawn uniformly, and goes on from there without another slip: all
later digits, the answer too, are off by the same number mod 10.

One builder config, `preferences`, with splits `train_2 .. train_6`, one per number of digits.
"""

import functools
import os
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from jentropy.data import chain_sum, storage
from jentropy.data.preferences import SIDES

_SEED = 20250529
_NUM_PAIRS = 4_000


def chains(digits: np.ndarray) -> np.ndarray:
    """The right chains `[N, 7]` int32 to prompts with digits `[N, n]`, padded on the right."""
    rows, num_digits = digits.shape
    response = np.full((rows, chain_sum.RESPONSE_LENGTH), chain_sum.PAD, np.int32)
    response[:, 0], response[:, num_digits] = chain_sum.STEPS, chain_sum.EOS
    response[:, 1:num_digits] = (np.cumsum(digits, axis=1) % 10)[:, 1:]
    return response


def make_pairs(digits: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Pairs of responses to prompts with digits `[N, n]`.

    Args:
      digits: `[N, n]` integers in 0..9.
      rng: generator; advanced.

    Returns:
      `chosen` and `rejected` `[N, 7]`, padded on the right, `chosen_length` and `rejected_length` `[N]` with EOS, all
      int32.
    """
    rows, num_digits = digits.shape
    chosen = chains(digits)
    slip = rng.integers(1, num_digits, rows)[:, None]
    column = np.arange(chain_sum.RESPONSE_LENGTH)[None, :]
    wrong = (chosen + rng.integers(1, 10, rows)[:, None]) % 10
    rejected = np.where((column >= slip) & (column < num_digits), wrong, chosen).astype(np.int32)
    length = np.full(rows, num_digits + 1, np.int32)
    return {"chosen": chosen, "chosen_length": length, "rejected": rejected, "rejected_length": length}


class ChainSumPairs(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of the pairs; records are stored as array_record, in a fixed order."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # nothing is downloaded, so TFDS need not look for a checksum file beside the source
    BUILDER_CONFIGS = [  # noqa: RUF012 - the name and type that TFDS asks for
        tfds.core.BuilderConfig(name="preferences", description="Right chains against chains with a wrong step."),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        tokens = functools.partial(tfds.features.Tensor, dtype=np.int32)
        features = {
            "prompt": tokens(shape=(chain_sum.PROMPT_LENGTH,)),
            "answer": tfds.features.Scalar(dtype=np.int32),
            "num_digits": tfds.features.Scalar(dtype=np.int32),
        }
        for side in SIDES:
            features[side] = tokens(shape=(chain_sum.RESPONSE_LENGTH,))
            features[f"{side}_length"] = tfds.features.Scalar(dtype=np.int32)
        return tfds.core.DatasetInfo(
            builder=self,
            description="Chained addition modulo 10: a right chain and one with a wrong step.",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager
        return {f"train_{n}": self._generate_examples(n) for n in chain_sum.NUM_DIGITS}

    def _generate_examples(self, num_digits: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        digits = chain_sum.prompt_digits(num_digits)
        digits = digits[~chain_sum.is_heldout(digits)]
        digits = digits[np.arange(_NUM_PAIRS) % len(digits)]
        arrays = make_pairs(digits, np.random.default_rng([_SEED, num_digits])) | chain_sum.encode_prompts(digits)
        for i in range(len(digits)):
            yield i, {name: array[i] for name, array in arrays.items()}


def split_arrays(split: str, data_dir: str | os.PathLike | None = None) -> storage.Arrays:
    """One split as read-only int32 arrays by feature name; see `storage.split_arrays`.

    Args:
      split: such as "train_2".
      data_dir: folder of all datasets; None for `storage.default_data_dir()`.
    """
    return storage.split_arrays(ChainSumPairs, "preferences", split, data_dir)
