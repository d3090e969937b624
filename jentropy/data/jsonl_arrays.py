"""Prepared JSONL data (`data/jsonl.py`) as arrays: tokens for the policy, fields for the graders."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from jentropy.data.jsonl import PAIRS, PROMPTS, Prepared, rows
from jentropy.data.preferences import SIDES
from jentropy.data.tokenizer import Tokenizer

_RESPONSES = {PROMPTS: ("response",), PAIRS: SIDES}


def texts(data: Prepared) -> Iterator[str]:
    """All text that a policy may read or write: prompts, responses, and answers that are text or numbers."""
    for split in data.splits:
        for row in rows(data, *split):
            answer = row.get("answer")
            yield row["prompt"] + "".join(row.get(name, "") for name in _RESPONSES[data.kind])
            yield str(answer) if _is_plain(answer) else ""


def _is_plain(answer: Any) -> bool:
    return isinstance(answer, str | int | float) and not isinstance(answer, bool)


def longest_prompt(data: Prepared, tokenizer: Tokenizer) -> int:
    """Tokens of the longest prompt of all splits."""
    return max(len(tokenizer.encode(row["prompt"])) for split in data.splits for row in rows(data, *split))


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonlArrays:
    """Tokenized splits of a prepared dataset: what `Task.split_arrays` calls. A value, hashable.

    Attributes:
      data: the dataset.
      tokenizer: text to tokens.
      prompt_columns: L, columns of the prompt bucket.
      max_new_tokens: R, columns of demonstrated responses, their end included.
    """

    data: Prepared
    tokenizer: Tokenizer
    prompt_columns: int
    max_new_tokens: int

    def __call__(self, config: str, split: str, data_dir: str | None) -> dict[str, np.ndarray]:
        """The arrays of a split.

        Args:
          config: "prompts", or "demonstrations" for rows with a response.
          split: "train_<part>" or "heldout_<part>".
          data_dir: not used, the dataset knows its folder.

        Returns:
          `prompt` `[N, L]` and `prompt_length` `[N]` int32, right padded. With "prompts" also every field of the
          data: int32 or bool if all values are such, else Python objects, None where a row has no such field, and
          `part`, the part's name. With "demonstrations" also what `DemonstrationSource` needs.

        Raises:
          ValueError: a prompt or a response does not fit, or is no token long; names part and row.
        """
        del data_dir
        return dict(_arrays(self, config, split))


@functools.lru_cache(maxsize=8)
def _fields(data: Prepared) -> tuple[str, ...]:
    """Names of all fields but the prompt that any row has, so that all splits have the same."""
    return tuple(sorted({name for split in data.splits for row in rows(data, *split) for name in row} - {"prompt"}))


@functools.lru_cache(maxsize=128)
def _arrays(splits: JsonlArrays, config: str, split: str) -> tuple[tuple[str, np.ndarray], ...]:
    prefix, _, part = split.partition("_")
    found = rows(splits.data, prefix, part)
    if config == "demonstrations":
        found = tuple(row for row in found if "response" in row)
    tokenizer, columns = splits.tokenizer, splits.prompt_columns
    prompts = [tokenizer.encode(row["prompt"]) for row in found]
    arrays = dict(zip(("prompt", "prompt_length"), _pad(prompts, columns, tokenizer.pad_id, f"{split}: prompt")))
    if config == "prompts":
        arrays |= {name: _column([row.get(name) for row in found]) for name in _fields(splits.data)}
        arrays["part"] = _column([part] * len(found))
        return tuple(arrays.items())
    end = np.asarray([tokenizer.eos_id], np.int32)
    responses = [np.concatenate([tokenizer.encode(row["response"]), end]) for row in found]
    padded, length = _pad(responses, splits.max_new_tokens, tokenizer.pad_id, f"{split}: response")
    arrays |= {"response": padded, "response_length": length, "strategy": np.zeros(len(found), np.int32)}
    return tuple(arrays.items())


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairArrays:
    """Tokenized splits of a dataset of pairs: what `Task.pair_arrays` calls. A value, hashable.

    Attributes:
      data: the dataset, of kind `jsonl.PAIRS`.
      tokenizer: text to tokens.
      prompt_columns: L, columns of the prompt bucket.
      max_new_tokens: R, columns of responses, their end included.
    """

    data: Prepared
    tokenizer: Tokenizer
    prompt_columns: int
    max_new_tokens: int

    def __call__(self, split: str, data_dir: str | None) -> dict[str, np.ndarray]:
        """The arrays of a split, as `PreferenceSource` wants them.

        Args:
          split: "train_<part>".
          data_dir: not used, the dataset knows its folder.

        Raises:
          ValueError: a prompt or a response does not fit, or is no token long, or both responses have the same tokens;
            names part and row.
        """
        del data_dir
        return dict(_pair_arrays(self, split))


@functools.lru_cache(maxsize=128)
def _pair_arrays(splits: PairArrays, split: str) -> tuple[tuple[str, np.ndarray], ...]:
    prefix, _, part = split.partition("_")
    found, tokenizer = rows(splits.data, prefix, part), splits.tokenizer
    prompts = [tokenizer.encode(row["prompt"]) for row in found]
    padded, length = _pad(prompts, splits.prompt_columns, tokenizer.pad_id, f"{split}: prompt")
    arrays = {"prompt": padded, "prompt_length": length}
    for side in SIDES:
        ended = [np.append(tokenizer.encode(row[side]), tokenizer.eos_id) for row in found]
        padded, length = _pad(ended, splits.max_new_tokens, tokenizer.pad_id, f"{split}: {side}")
        arrays |= {side: padded, f"{side}_length": length}
    same = np.all(arrays["chosen"] == arrays["rejected"], axis=1) & (arrays["chosen_length"] == length)
    if same.any():
        raise ValueError(f"{split}: chosen and rejected of row {np.argmax(same)} have the same tokens")
    return tuple(arrays.items())


def _pad(encoded: list[np.ndarray], columns: int, pad_id: int, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Token ids as `[N, columns]` int32, right padded, and their number `[N]` int32."""
    padded = np.full((len(encoded), columns), pad_id, np.int32)
    for row, ids in enumerate(encoded):
        if not 1 <= len(ids) <= columns:
            raise ValueError(f"{what} of row {row} has {len(ids)} tokens, not 1 to {columns}")
        padded[row, : len(ids)] = ids
    return padded, np.asarray([len(ids) for ids in encoded], np.int32)


def _column(values: list[Any]) -> np.ndarray:
    """Values `[N]` as int32 or bool if all are such, else as Python objects."""
    if values and all(type(value) is bool for value in values):
        return np.asarray(values, bool)
    if values and all(type(value) is int and abs(value) < 2**31 for value in values):
        return np.asarray(values, np.int32)
    array = np.empty(len(values), object)
    for row, value in enumerate(values):
        array[row] = value
    return array
