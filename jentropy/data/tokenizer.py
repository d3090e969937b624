"""Tokenizers: what a task needs of one, characters as tokens, and those of a `tokenizer.json`."""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jentropy import base

_PAD, _EOS = "␀", "␃"
_EOS_NAMES = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|eos|>")
_PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|endoftext|>")


class Tokenizer(Protocol):
    """Text to tokens and back; hashable, equal if and only if it gives the same tokens."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens V; all ids are below."""
        ...

    @property
    def pad_id(self) -> int:
        """Id of the padding token."""
        ...

    @property
    def eos_id(self) -> int:
        """Id of the end-of-sequence token."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """The token ids `[N]` int32 of a text, without special tokens."""
        ...

    def decode_rows(self, tokens: np.ndarray, mask: np.ndarray) -> list[str]:
        """The text of the masked tokens of each row; tokens `[B, T]`, mask `[B, T]` bool."""
        ...


@dataclasses.dataclass(frozen=True)
class CharTokenizer:
    """A vocabulary of single characters, hashable.

    Attributes:
      alphabet: distinct characters; the id of a character is its index.
      pad: the character of the padding token.
      eos: the character of the end-of-sequence token.
      shows_special: whether `decode_rows` shows padding and ends; if not, it drops them, and shows ids beyond the
        alphabet, which a policy with a larger vocabulary may sample, as U+FFFD.
    """

    alphabet: str
    pad: str
    eos: str
    shows_special: bool = True

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
        decode = self.decode if self.shows_special else self._plain
        return [decode(row[keep]) for row, keep in zip(tokens, mask)]

    def _plain(self, tokens: Iterable[int]) -> str:
        ids = [int(token) for token in tokens]
        kept = [token for token in ids if token not in (self.pad_id, self.eos_id)]
        return "".join(self.alphabet[token] if 0 <= token < self.vocab_size else "\ufffd" for token in kept)


CHAIN_SUM = CharTokenizer(alphabet="0123456789_=DSP|", pad="_", eos="|")
"""Chained addition: the prompt of 1 + 2 is `12____=`, its responses are `D3|` and `S3|`."""

CHAIN_SUM_EXITS = CharTokenizer(alphabet="0123456789_=DSX|", pad="_", eos="|")
"""The same with exits, `X`, behind which the answer stands: `S33X3|`."""


def char_tokenizer(texts: Iterable[str]) -> CharTokenizer:
    """The characters of `texts`, sorted, after padding and end of sequence; these two are not shown in decoded text.

    Raises:
      ValueError: there is no character, or one of the two that stand for padding and end of sequence.

    >>> char_tokenizer(["1+2=", "3"]).encode("3=").tolist()
    [5, 6]
    """
    characters = sorted(set().union(*texts))
    base.require(bool(characters), "texts", "", "not empty")
    for special in (_PAD, _EOS):
        base.require(special not in characters, "texts", special, "without the characters of padding and end")
    return CharTokenizer("".join([_PAD, _EOS, *characters]), _PAD, _EOS, shows_special=False)


@dataclasses.dataclass(frozen=True)
class FileTokenizer:
    """The tokenizer of a `tokenizer.json`; needs the package `tokenizers` (`pip install jentropy[hf]`). Hashable.

    Special tokens are neither added to what is encoded nor shown in what is decoded.

    Attributes:
      path: of the file.
      sha256: hex digest of the file's bytes; a file that has changed is refused.
      pad_id: id of the padding token.
      eos_id: id of the end-of-sequence token.
      vocab_size: number of tokens V, added ones included.
    """

    path: str
    sha256: str
    pad_id: int
    eos_id: int
    vocab_size: int

    def encode(self, text: str) -> np.ndarray:
        """The token ids `[N]` int32 of a text, without special tokens."""
        return np.asarray(_load(self.path, self.sha256).encode(text, add_special_tokens=False).ids, np.int32)

    def decode_rows(self, tokens: np.ndarray, mask: np.ndarray) -> list[str]:
        """The text of the masked tokens of each row; tokens `[B, T]`, mask `[B, T]` bool."""
        decode = functools.partial(_load(self.path, self.sha256).decode, skip_special_tokens=True)
        special = (self.pad_id, self.eos_id)
        rows = [row[keep].tolist() for row, keep in zip(np.asarray(tokens), np.asarray(mask))]
        return [decode([token for token in row if token not in special]) for row in rows]


def file_tokenizer(path: str | os.PathLike, *, eos: str | None = None, pad: str | None = None) -> FileTokenizer:
    """The tokenizer of a `tokenizer.json`.

    Args:
      path: of the file, or of the folder that holds it.
      eos: the token that ends a response; None for that of the `tokenizer_config.json` beside it, or a usual name.
      pad: the padding token; None likewise, and the end-of-sequence token if there is none.

    Raises:
      ImportError: the package `tokenizers` is not installed.
      FileNotFoundError: no such file.
      ValueError: not a tokenizer, or one without such tokens.
    """
    path = Path(path).expanduser().resolve()
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer at {path}")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    vocabulary = _load(str(path), sha256).get_vocab(with_added_tokens=True)
    beside = path.with_name("tokenizer_config.json")
    named = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    eos_id = _find("eos", vocabulary, eos, named.get("eos_token"), _EOS_NAMES)
    if eos_id is None:
        raise ValueError(f"{path} has no usual end-of-sequence token: name it with eos")
    pad_id = _find("pad", vocabulary, pad, named.get("pad_token"), _PAD_NAMES)
    size = max(vocabulary.values()) + 1
    return FileTokenizer(str(path), sha256, eos_id if pad_id is None else pad_id, eos_id, size)


def _find(
    argument: str, vocabulary: dict[str, int], given: str | None, named: Any, usual: tuple[str, ...]
) -> int | None:
    """The id of a special token: the one given, else the one of the config file, else the first usual one."""
    if given is not None:
        base.require(given in vocabulary, argument, given, "a token of the vocabulary")
        return vocabulary[given]
    named = named.get("content") if isinstance(named, dict) else named
    return next((vocabulary[token] for token in (named, *usual) if token in vocabulary), None)


@functools.lru_cache(maxsize=8)
def _load(path: str, sha256: str) -> Any:
    """The `tokenizers.Tokenizer` of a file with a known checksum."""
    try:
        import tokenizers  # pyright: ignore[reportMissingImports] (an extra)
    except ImportError as error:
        raise ImportError(f"{path} needs the package tokenizers: pip install 'jentropy[hf]'") from error
    text = Path(path).read_bytes()
    if hashlib.sha256(text).hexdigest() != sha256:
        raise ValueError(f"{path} has changed: its sha256 is not {sha256}")
    try:
        return tokenizers.Tokenizer.from_str(text.decode())
    except Exception as error:  # the package raises nothing more special
        raise ValueError(f"{path} is not a tokenizer.json: {error}") from error
