"""Preferences between two responses to one prompt, drawn from weighted splits: a pure function of (seed, step)."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jentropy.data.source import PREFERENCES, Mixture, close_gap, generator

SIDES = ("chosen", "rejected")
"""Of a pair, in the order of its rows."""


class PairBatch(NamedTuple):
    """P pairs in T columns, on the host: row 2p is the chosen response of pair p, row 2p + 1 the rejected one.

    Attributes:
      tokens: `[2P, T]` int32, prompt then response, right padded.
      mask: `[2P, T]` bool, the tokens of the response.
      prompt_length: `[2P]` int32, tokens before the response.
      example_id: `[P]` int64, the pair's place in the source's splits, concatenated in their order.
    """

    tokens: np.ndarray
    mask: np.ndarray
    prompt_length: np.ndarray
    example_id: np.ndarray


class PreferenceSource:
    """Pairs drawn from weighted splits."""

    def __init__(self, splits: Mapping, weights: Mapping):
        """Builds the source.

        Args:
          splits: by split name, arrays by feature name: `prompt` `[N, L]`, right padded if there is a
            `prompt_length` `[N]` (default L), and for `chosen` and `rejected` `[N, R]`, right padded, and
            `chosen_length` and `rejected_length` `[N]`.
          weights: unnormalised probability by split name.

        Raises:
          ValueError: see `Mixture`.
        """
        self._mixture = Mixture(splits, weights)

    def batch(self, seed: int, step: int, size: int) -> PairBatch:
        """`size` pairs, drawn independently: a pure function of the arguments."""
        index = self._mixture.draw(generator(seed, PREFERENCES, step), size)
        rows = {name: array[index] for name, array in self._mixture.arrays.items()}
        prompt = rows["prompt"]
        length = rows.get("prompt_length", np.full(size, prompt.shape[1])).astype(np.int32)
        sides = [_row(prompt, length, rows[side], rows[f"{side}_length"]) for side in SIDES]
        tokens, mask = (_interleave(*arrays) for arrays in zip(*sides))
        return PairBatch(tokens, mask, np.repeat(length, 2), index)


def _row(prompt: np.ndarray, length: np.ndarray, response: np.ndarray, end: np.ndarray) -> list[np.ndarray]:
    """Tokens and response mask `[N, T]` of prompts `[N, L]` of some length followed by responses `[N, R]`."""
    tokens = np.concatenate([prompt, response], axis=1)
    mask = np.concatenate([np.zeros(prompt.shape, bool), np.arange(response.shape[1]) < end[:, None]], axis=1)
    order = close_gap(length, prompt.shape[1], tokens.shape[1])
    return [np.take_along_axis(array, order, axis=1) for array in (tokens, mask)]


def _interleave(chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    return np.stack([chosen, rejected], axis=1).reshape(-1, chosen.shape[1])
