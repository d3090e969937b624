"""Where the steps of a response begin: rules that tasks give to methods that value each step."""

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from jentropy import base
from jentropy.data.tokenizer import Tokenizer

StepBoundary: TypeAlias = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(tokens `[B, T]`, response mask `[B, T]`) -> `[B, T]` bool, True at the first token of each step; on the host.

The first token of a response begins its first step, whatever the rule says.
"""


@dataclasses.dataclass(frozen=True)
class EveryToken:
    """Every token is a step but the one that ends the response, which is of the step before it.

    Attributes:
      eos_id: the id of that token.
    """

    eos_id: int

    def __call__(self, tokens: np.ndarray, response_mask: np.ndarray) -> np.ndarray:
        """See `StepBoundary`."""
        return response_mask & (tokens != self.eos_id)


@dataclasses.dataclass(frozen=True)
class AfterText:
    """A step begins at the first token that is not blank after a token in which a text stands, such as a newline.

    A token that goes beyond the text belongs to the step in which it begins. Blank tokens, and those that decode to
    nothing as the one that ends a response, begin no step; nor does what follows text at the very beginning.

    Attributes:
      tokenizer: of the tokens.
      text: what ends a step, within one token.

    Raises:
      ValueError: the text is empty.
    """

    tokenizer: Tokenizer
    text: str = "\n"

    def __post_init__(self) -> None:
        base.require(bool(self.text), "text", self.text, "not empty")

    def __call__(self, tokens: np.ndarray, response_mask: np.ndarray) -> np.ndarray:
        """See `StepBoundary`."""
        ids = np.unique(tokens)
        texts = self.tokenizer.decode_rows(ids[:, None], np.ones((len(ids), 1), bool))
        place = np.searchsorted(ids, tokens)
        ends = response_mask & np.asarray([self.text in text for text in texts])[place]
        shows = response_mask & np.asarray([bool(text.strip()) for text in texts])[place]
        ended = np.cumsum(ends, axis=1) - ends
        last = np.maximum.accumulate(np.where(shows, ended, -1), axis=1)
        before = np.concatenate([np.full_like(last[:, :1], -1), last[:, :-1]], axis=1)
        return shows & (before >= 0) & (ended > before)


def step_ids(boundary: np.ndarray, response_mask: np.ndarray) -> np.ndarray:
    """The step of each response token, `[B, T]` int32, 0 first and -1 outside; the first token begins a step.

    Args:
      boundary: `[B, T]` bool; entries outside the response are ignored.
      response_mask: `[B, T]` bool.
    """
    counted = np.cumsum(response_mask, axis=1)
    begins = response_mask & (boundary | (counted == 1))
    return np.where(response_mask, np.cumsum(begins, axis=1) - 1, -1).astype(np.int32)
