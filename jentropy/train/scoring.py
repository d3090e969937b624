"""One forward pass: what plan and loss know of the policy."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jentropy import head
from jentropy.base import Array, Output, Policy, Rollouts

Scorer: TypeAlias = Callable[[Any, Mapping[str, Any], Rollouts], dict[str, Array]]
"""(params, frozen, rows) -> {output name: `[b, T]`}, 0 outside the loss mask."""

_HEAD = ("log_prob", "entropy", "log_normaliser")
_PAIR = {"reference_kl": "kl", "reference_forward_kl": "reverse_kl"}


def _check(outputs: tuple[Output, ...]) -> None:
    known = (*_HEAD, *_PAIR)
    for output in outputs:
        if output.name not in known:
            raise ValueError(f"no forward pass provides the output {output.name!r}; known: {', '.join(known)}")


def _aligned(x: Array, mask: Array) -> Array:
    """`[b, T - 1]` scores of tokens 1.. as `[b, T]`, 0 in column 0 and outside the mask."""
    return jnp.where(mask, jnp.pad(x, ((0, 0), (1, 0))), jnp.zeros((), x.dtype))


@functools.lru_cache
def make_scorer(policy: Policy, outputs: tuple[Output, ...], temperature: float) -> Scorer:
    """The scorer of `outputs` at a sampling temperature.

    Quantities are 0 outside `loss_mask`, in value and gradient, whatever the rows hold there. A row's own
    temperatures, `token_data["temperature"]` `[b, T]`, take the place of `temperature`.

    Args:
      policy: the model.
      outputs: what to score.
      temperature: divides the logits before log-probability and entropy.

    Raises:
      ValueError: an output that no forward pass provides.
    """
    _check(outputs)
    names = [output.name for output in outputs]

    def score(params: Any, frozen: Mapping[str, Any], rows: Rollouts) -> dict[str, Array]:
        hidden = policy.hidden(params, rows.tokens)[:, :-1]
        unembed = policy.unembed(params)
        tau = rows.token_data["temperature"][:, 1:] if "temperature" in rows.token_data else temperature
        found = head.linear_scores(hidden, unembed, rows.tokens[:, 1:], temperature=tau)._asdict()
        if any(name in _PAIR for name in names):
            reference = jax.lax.stop_gradient(frozen["reference"])
            other = policy.hidden(reference, rows.tokens)[:, :-1]
            pair = head.pair_scores(hidden, unembed, other, policy.unembed(reference), temperature=tau)
            found |= {name: getattr(pair, field) for name, field in _PAIR.items()}
        return {str(output): _aligned(found[output.name], rows.loss_mask) for output in outputs}

    return score


def to_micro(tree: Any, num: int) -> Any:
    """Leaves `[B, ...]` as `[num, B / num, ...]`; micro-batch m holds rows m, m + num, ...

    Strided, so that rows sharded over devices stay where they are inside each micro-batch.
    """
    return jax.tree.map(lambda x: x.reshape((-1, num, *x.shape[1:])).swapaxes(0, 1), tree)


def from_micro(tree: Any) -> Any:
    """The inverse of `to_micro`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape((-1, *x.shape[2:])), tree)


def score_rows(scorer: Scorer, params: Any, frozen: Mapping[str, Any], rows: Rollouts, num: int) -> dict[str, Array]:
    """Scores all rows in `num` micro-batches, without gradient."""
    if num == 1:
        return jax.lax.stop_gradient(scorer(params, frozen, rows))
    micro = jax.lax.map(lambda part: scorer(params, frozen, part), to_micro(rows, num))
    return jax.lax.stop_gradient(from_micro(micro))
