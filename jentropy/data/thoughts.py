"""Which tokens of a response are its thought: rules that tasks give to methods that stop it early."""

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import chex
import jax.numpy as jnp

from jentropy.base import Array, require

Thought: TypeAlias = Callable[[Array, Array], Array]
"""(tokens `[B, T]`, response mask `[B, T]`) -> `[B, T]` bool, True on the tokens of a thought that has come to its end,
nowhere in a row whose has not; on the device."""


@dataclasses.dataclass(frozen=True)
class BeforeMarker:
    """The thought is all of the response before the first place where some tokens stand, if there is one.

    Attributes:
      marker: ids of these tokens, one after the other.

    Raises:
      ValueError: there are none.
    """

    marker: tuple[int, ...]

    def __post_init__(self) -> None:
        require(len(self.marker) >= 1, "marker", self.marker, "at least one token")

    def __call__(self, tokens: Array, response_mask: Array) -> Array:
        """See `Thought`."""
        chex.assert_rank([tokens, response_mask], 2)
        num_columns, fits = tokens.shape[1], response_mask
        for place, token in enumerate(self.marker):
            here = (tokens == token) & response_mask
            fits &= jnp.pad(here, ((0, 0), (0, place)))[:, place : place + num_columns]
        seen = jnp.cumsum(fits, axis=1, dtype=jnp.int32) > 0
        return response_mask & ~seen & jnp.any(fits, axis=1)[:, None]
