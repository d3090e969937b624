"""Sources of batches: mixtures of splits whose order is a pure function of (seed, step).

No loader, no state: a batch is drawn from a counter-based generator keyed by (seed, stream, step), so a resumed run
sees what an uninterrupted one would have seen. Draws are independent, with replacement, and prefix-stable: the first
rows of a larger batch are the smaller batch.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jentropy import base

_PROMPTS, _FIXED, _DEMONSTRATIONS, PREFERENCES = range(4)  # independent streams of one seed


class Prompts(NamedTuple):
    """A batch of P prompts in L columns, on the host.

    Attributes:
      tokens: `[P, L]` int32, right padded.
      length: `[P]` int32, tokens in each prompt.
      fields: `[P]` arrays by name: what graders and reports need, such as the answer.
      example_id: `[P]` int64, the prompt's place in the source's splits, concatenated in their order.
    """

    tokens: np.ndarray
    length: np.ndarray
    fields: dict[str, np.ndarray]
    example_id: np.ndarray


class Demonstrations(NamedTuple):
    """A batch of B supervised rows in T columns, on the host.

    Attributes:
      tokens: `[B, T]` int32, prompt then response, right padded.
      weight: `[B, T]` float32, weight of each token's loss: 0 on the prompt and on padding.
    """

    tokens: np.ndarray
    weight: np.ndarray


def generator(seed: int, stream: int, step: int, draw: int = 0) -> np.random.Generator:
    """A generator that is a pure function of four non-negative integers."""
    for name, value in (("seed", seed), ("step", step), ("draw", draw)):
        base.require(value >= 0, name, value, "non-negative")
    spawn_key = (draw,) if draw else ()
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, stream, step], spawn_key=spawn_key)))


class Mixture:
    """Rows of several splits, drawn with given probabilities per split and uniformly within one.

    Attributes:
      arrays: features by name, `[N, ...]`, of all splits concatenated in their order.
    """

    def __init__(self, splits: Mapping, weights: Mapping):
        """Checks and concatenates.

        Args:
          splits: arrays `[N_s, ...]` by feature name, by split name; all with the same features.
          weights: unnormalised probability by split name; splits that are not named have none.

        Raises:
          ValueError: a weight is negative, not finite or of an unknown split, all are zero, or a split with a positive
            weight is empty.
        """
        for name, weight in weights.items():
            base.require(name in splits, "weights", name, f"given for splits among {list(splits)}")
            base.require(0 <= weight < np.inf, f"weights[{name!r}]", weight, "finite and non-negative")
        weight = np.asarray([weights.get(name, 0.0) for name in splits], np.float64)
        base.require(weight.sum() > 0, "weights", dict(weights), "positive for at least one split")
        self._size = np.asarray([len(next(iter(arrays.values()))) for arrays in splits.values()])
        for name, share, size in zip(splits, weight, self._size):
            if share > 0 and size == 0:
                raise ValueError(f"split {name!r} has weight {share} but no example")
        self._offset = np.cumsum(self._size) - self._size
        self._probability = weight / weight.sum()
        features = next(iter(splits.values()))
        self.arrays = {name: np.concatenate([arrays[name] for arrays in splits.values()]) for name in features}

    def draw(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """Indices `[size]` of independent rows, with replacement."""
        base.require(size >= 1, "size", size, "at least 1")
        uniform = rng.random((size, 2))
        bounds = np.cumsum(self._probability)
        split = np.searchsorted(bounds / bounds[-1], uniform[:, 0], side="right")
        within = np.minimum((uniform[:, 1] * self._size[split]).astype(np.int64), self._size[split] - 1)
        return self._offset[split] + within

    def stratify(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """Indices `[size]` with each split's share rounded by largest remainder, and within a split as few repeats as
        its size allows."""
        base.require(size >= 1, "size", size, "at least 1")
        share = self._probability * size
        count = np.floor(share).astype(int)
        remainder = np.where(self._probability > 0, share - count, -1.0)
        count[np.argsort(-remainder, kind="stable")[: size - count.sum()]] += 1
        index = []
        for offset, split_size, wanted in zip(self._offset, self._size, count):
            if wanted:
                rounds = [rng.permutation(split_size) for _ in range(-(-wanted // split_size))]
                index.append(offset + np.concatenate(rounds)[:wanted])
        return np.concatenate(index)


class MixtureSource:
    """Prompts drawn from weighted splits."""

    def __init__(self, splits: Mapping, weights: Mapping):
        """Builds the source.

        Args:
          splits: by split name, arrays by feature name: `prompt` `[N, L]` right padded, optionally `prompt_length`
            `[N]` (default L), and `[N]` fields.
          weights: unnormalised probability by split name.

        Raises:
          ValueError: see `Mixture`.
        """
        self._mixture = Mixture(splits, weights)

    def batch(self, seed: int, step: int, size: int, draw: int = 0) -> Prompts:
        """`size` prompts, drawn independently: a pure function of the arguments.

        Args:
          seed: of the run.
          step: the rollout's number.
          size: prompts.
          draw: number of the batch within its rollout; dynamic sampling draws one in every round.
        """
        return self._take(self._mixture.draw(generator(seed, _PROMPTS, step, draw), size))

    def fixed(self, seed: int, size: int) -> Prompts:
        """`size` evaluation prompts: each split has its rounded share, in order, with as few repeats as possible."""
        return self._take(self._mixture.stratify(generator(seed, _FIXED, 0), size))

    def _take(self, index: np.ndarray) -> Prompts:
        fields = {name: array[index] for name, array in self._mixture.arrays.items()}
        tokens = fields.pop("prompt")
        length = fields.pop("prompt_length", np.full(len(index), tokens.shape[1], np.int32))
        return Prompts(tokens=tokens, length=length, fields=fields, example_id=index)


class DemonstrationSource:
    """Supervised rows drawn from weighted splits, with a chosen prior of the two strategies."""

    def __init__(self, splits: Mapping, weights: Mapping, *, strategy_prior: float = 0.5):
        """Builds the source.

        The first response token of a row of strategy 1 weighs p / 0.5, that of strategy 0 weighs (1 - p) / 0.5: the
        minimiser of the weighted loss starts strategy 1 with probability p and keeps both skills.

        Args:
          splits: by split name, arrays by feature name: `prompt` `[N, L]`, right padded if there is a
            `prompt_length` `[N]` (default L), `response` `[N, R]` right padded, `response_length` `[N]`, `strategy`
            `[N]` (0 or 1, half each).
          weights: unnormalised probability by split name.
          strategy_prior: p in `[0, 1]`.

        Raises:
          ValueError: the prior is out of range, or see `Mixture`.
        """
        base.require(0 <= strategy_prior <= 1, "strategy_prior", strategy_prior, "in [0, 1]")
        self._mixture = Mixture(splits, weights)
        self._strategy_prior = strategy_prior

    def batch(self, seed: int, step: int, size: int) -> Demonstrations:
        """`size` rows, drawn independently: a pure function of the arguments."""
        index = self._mixture.draw(generator(seed, _DEMONSTRATIONS, step), size)
        rows = {name: array[index] for name, array in self._mixture.arrays.items()}
        prior = self._strategy_prior
        weight = (np.arange(rows["response"].shape[1]) < rows["response_length"][:, None]).astype(np.float32)
        weight[:, 0] *= np.where(rows["strategy"] == 1, prior / 0.5, (1 - prior) / 0.5)
        tokens = np.concatenate([rows["prompt"], rows["response"]], axis=1)
        weight = np.concatenate([np.zeros(rows["prompt"].shape, np.float32), weight], axis=1)
        if "prompt_length" in rows:
            order = close_gap(rows["prompt_length"], rows["prompt"].shape[1], tokens.shape[1])
            tokens, weight = (np.take_along_axis(array, order, axis=1) for array in (tokens, weight))
        return Demonstrations(tokens=tokens, weight=weight)


def close_gap(length: np.ndarray, prompt_columns: int, num_columns: int) -> np.ndarray:
    """The columns `[B, num_columns]` of rows in which the response follows the prompt and the prompt's padding ends."""
    column, end = np.arange(num_columns)[None, :], length[:, None]
    response_columns = num_columns - prompt_columns
    moved = np.where(column < end + response_columns, column + prompt_columns - end, column - response_columns)
    return np.where(column < end, column, moved)
