"""One forward pass: what plan and loss know of the policy."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jentropy import head
from jentropy.base import Array, Output, Policy, Rollouts, require
from jentropy.nucleus import NucleusKind, nucleus_entropies

Scorer: TypeAlias = Callable[[Any, Mapping[str, Any], Rollouts], dict[str, Array]]
"""(params, frozen, rows) -> {output name: `[b, T]`}, 0 outside the loss mask."""

_HEAD = ("log_prob", "entropy", "log_normaliser")
_PAIR = {"reference_kl": "kl", "reference_forward_kl": "reverse_kl"}
_NUCLEUS = {"nucleus_entropy": False, "nucleus_entropy_released": True}


def _check(outputs: tuple[Output, ...]) -> None:
    known = (*_HEAD, *_PAIR, *_NUCLEUS)
    for name, argument in outputs:
        if name not in known:
            raise ValueError(f"no forward pass provides the output {name!r}; known: {', '.join(known)}")
        if name in _NUCLEUS:
            require(argument is not None and 0.0 < argument <= 1.0, f"the argument of {name}", argument, "in (0, 1]")
        else:
            require(argument is None, f"the argument of {name}", argument, "None")


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
      ValueError: an output that no forward pass provides, or one with a wrong argument.
    """
    _check(outputs)
    names = [output.name for output in outputs]
    nuclei = {o: NucleusKind(o.argument, _NUCLEUS[o.name]) for o in outputs if o.name in _NUCLEUS and o.argument}

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
        if nuclei:
            entropies = nucleus_entropies(hidden, unembed, tuple(nuclei.values()), temperature=tau)
            found |= {str(output): entropy for output, entropy in zip(nuclei, entropies)}
        return {name: _aligned(found[name], rows.loss_mask) for name in map(str, outputs)}

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
