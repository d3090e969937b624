"""Character-level tokenizers: one character is one token, and its id is its place in the alphabet."""

import dataclasses
from collections.abc import Iterable

import numpy as np


@dataclasses.dataclass(frozen=True)
class CharTokenizer:
    """A vocabulary of single characters, hashable.

    Attributes:
      alphabet: distinct characters; the id of a character is its index.
      pad: the character of the padding token.
      eos: the character of the end-of-sequence token.
    """

    alphabet: str
    pad: str
    eos: str

    def __post_init__(self):
        if len(set(self.alphabet)) != len(self.alphabet):
            raise ValueError(f"alphabet must have distinct characters, got {self.alphabet!r}")
        for name, character in (("pad", self.pad), ("eos", self.eos)):
            if len(character) != 1 or character not in self.alphabet:
                raise ValueError(f"{name} must be one character of {self.alphabet!r}, got {character!r}")

    @property
    def vocab_size(self) -> int:
        """Number of tokens V."""
        return len(self.alphabet)

    @property
    def pad_id(self) -> int:
        """Id of the padding token."""
        return self.alphabet.index(self.pad)

    @property
    def eos_id(self) -> int:
        """Id of the end-of-sequence token."""
        return self.alphabet.index(self.eos)

    def encode(self, text: str) -> np.ndarray:
        """The token ids `[len(text)]` int32 of a text.

        Raises:
          ValueError: a character is not in the alphabet; names it and its position.
        """
        ids = [self.alphabet.find(character) for character in text]
        if -1 in ids:
            position = ids.index(-1)
            raise ValueError(f"character {text[position]!r} at position {position} is not in {self.alphabet!r}")
        return np.asarray(ids, np.int32)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of token ids `[N]`; the inverse of `encode`.

        Raises:
          ValueError: an id is not in `[0, vocab_size)`; names it and its position.
        """
        ids = [int(token) for token in tokens]
        for position, token in enumerate(ids):
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token {token} at position {position} is not in [0, {self.vocab_size})")
        return "".join(self.alphabet[token] for token in ids)

    def decode_rows(self, tokens: np.ndarray, mask: np.ndarray) -> list[str]:
        """The text of the masked tokens of each row.

        Args:
          tokens: `[B, T]` integers; ignored outside `mask`.
          mask: `[B, T]` bool.
        """
        tokens, mask = np.asarray(tokens), np.asarray(mask)
        return [self.decode(row[keep]) for row, keep in zip(tokens, mask)]


CHAIN_SUM = CharTokenizer(alphabet="0123456789_=DSP|", pad="_", eos="|")
"""Chained addition: the prompt of 1 + 2 is `12____=`, its responses are `D3|` and `S3|`."""
