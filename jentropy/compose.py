"""The algebra of mechanisms: named chains, stateless mechanisms, penalties on batch statistics, blocks."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jentropy.base import (
    Array,
    Mechanism,
    Normaliser,
    Output,
    Plan,
    Quantities,
    Rollouts,
    Signals,
    State,
    Term,
    require,
)


@dataclasses.dataclass(frozen=True)
class _Quantity:
    """The term that passes the quantity `name` through."""

    name: str

    def __call__(self, quantities: Quantities, plan: Plan, batch: Rollouts) -> Array:
        del plan, batch
        return quantities[self.name]


def quantity(name: str) -> Term:
    """The term `f_t = quantities[name]`; equal names give equal terms."""
    return _Quantity(name)


@dataclasses.dataclass(frozen=True)
class _ChainInit:
    names: tuple[str, ...]
    inits: tuple[Callable[[], State], ...]

    def __call__(self) -> dict[str, State]:
        return {name: init() for name, init in zip(self.names, self.inits)}


@dataclasses.dataclass(frozen=True)
class _ChainUpdate:
    names: tuple[str, ...]
    updates: tuple[Callable[..., Any], ...]

    def __call__(self, plan: Plan, state: State, signals: Signals, key: Array) -> tuple[Plan, State]:
        new_state = {}
        for i, (name, update) in enumerate(zip(self.names, self.updates)):
            plan, new_state[name] = update(plan, state[name], signals, jax.random.fold_in(key, i))
        return plan, new_state


def _merge_terms(mechanisms: Mapping[str, Mechanism]) -> dict[str, Term]:
    merged: dict[str, Term] = {}
    for name, mechanism in mechanisms.items():
        for term_name, term in mechanism.terms.items():
            if merged.setdefault(term_name, term) != term:
                raise ValueError(f"mechanism {name!r} defines the term {term_name!r} differently from one before it")
    return merged


def chain(**mechanisms: Mechanism) -> Mechanism:
    """Applies named mechanisms in order: each sees the plan that the one before it left.

    The state is `{name: state}` and the i-th mechanism gets `fold_in(key, i)`. Terms of one name must be the same
    function; their coefficients add up. The update compares equal to that of another chain of the same names and
    updates, so chains that differ only in numbers share one compilation.

    Args:
      **mechanisms: mechanisms by name; the empty chain is the identity.

    Raises:
      ValueError: two mechanisms define one term differently.

    >>> from jentropy.compose import chain
    >>> chain().init()
    {}
    """
    names = tuple(mechanisms)
    outputs = tuple(dict.fromkeys(o for m in mechanisms.values() for o in m.outputs))
    return Mechanism(
        init=_ChainInit(names, tuple(m.init for m in mechanisms.values())),
        update=_ChainUpdate(names, tuple(m.update for m in mechanisms.values())),
        outputs=outputs,
        terms=_merge_terms(mechanisms),
        min_updates=max((m.min_updates for m in mechanisms.values()), default=1),
        requires=tuple(dict.fromkeys(name for m in mechanisms.values() for name in m.requires)),
    )


class Part(NamedTuple):
    """One mechanism inside a chain: the module of its update, such as `clip_cov`, and its initial state."""

    method: str
    state: State


def parts(mechanism: Mechanism) -> tuple[Part, ...]:
    """The mechanisms that a mechanism is made of, in order, chains and blocks taken apart.

    >>> from jentropy.compose import chain, parts
    >>> parts(chain(inner=chain()))
    ()
    """
    return tuple(_parts(mechanism.update, mechanism.init()))


def _parts(update: Callable[..., Any], state: State) -> Iterator[Part]:
    if isinstance(update, _ChainUpdate):
        for name, inner in zip(update.names, update.updates):
            yield from _parts(inner, state[name])
    elif isinstance(update, _Blockwise):
        yield from _parts(update.update, state)
    else:
        yield Part(_method(update), state)


def _method(update: Callable[..., Any]) -> str:
    """The module of an update, such as `clip_cov`."""
    if isinstance(update, _Blockwise):
        return _method(update.update)
    function = update.function if isinstance(update, _Stateless) else update
    return function.__module__.rpartition(".")[2]


def walk(
    update: Callable[..., Any], plan: Plan, state: State, signals: Signals, key: Array
) -> tuple[Plan, State, dict[str, Array]]:
    """Runs a mechanism's `update` and says which tokens each part of it touched; plan and state are those of `update`.

    A part has touched a token if one of the plan's coefficients there (advantage, pg_weight, counted, a bound of the
    ratio, that of a term) is another one after it than before it. No part is known by name: chains are taken apart, in
    whatever depth, and anything else, `blockwise` included, is one part.

    Args:
      update: `Mechanism.update`.
      plan, state, signals, key: what it is called with; "key: consumed".

    Returns:
      The plan, the state, and `[B, T]` bool by the part's name, False outside `loss_mask`. Names in nested chains are
      joined with dots; a mechanism that is no chain goes by its method, as in `parts`.

    >>> plan, state, touched = walk(chain().update, *[None] * 4)
    >>> touched
    {}
    """
    touched: dict[str, Array] = {}

    def visit(name: str, update: Callable[..., Any], plan: Plan, state: State, key: Array) -> tuple[Plan, State]:
        if not isinstance(update, _ChainUpdate):
            new_plan, state = update(plan, state, signals, key)
            touched[name or _method(update)] = _touched(plan, new_plan, signals.batch.loss_mask)
            return new_plan, state
        states = {}
        for i, (inner_name, inner) in enumerate(zip(update.names, update.updates)):
            inner_key, path = jax.random.fold_in(key, i), f"{name}.{inner_name}" if name else inner_name
            plan, states[inner_name] = visit(path, inner, plan, state[inner_name], inner_key)
        return plan, states

    plan, state = visit("", update, plan, state, key)
    return plan, state, touched


def _touched(before: Plan, after: Plan, mask: Array) -> Array:
    """Where on the mask a coefficient differs, `[B, T]` bool; NaN equals NaN, and a term that is not there is 0."""
    zero = jnp.zeros_like(before.advantage)
    pairs = [(getattr(before, name), getattr(after, name)) for name in ("advantage", "pg_weight")]
    pairs += [(getattr(before, name), getattr(after, name)) for name in ("ratio_low", "ratio_high")]
    pairs += [(before.terms.get(name, zero), coefficient) for name, coefficient in after.terms.items()]
    found = before.counted != after.counted
    for old, new in pairs:
        found |= (old != new) & ~(jnp.isnan(old) & jnp.isnan(new))
    return found & mask


@dataclasses.dataclass(frozen=True)
class _Stateless:
    function: Callable[[Plan, Signals, Array], Plan]

    def __call__(self, plan: Plan, state: State, signals: Signals, key: Array) -> tuple[Plan, State]:
        return self.function(plan, signals, key), state


def _no_state() -> tuple[()]:
    return ()


def stateless(
    function: Callable[[Plan, Signals, Array], Plan],
    *,
    outputs: tuple[Output, ...] = (),
    terms: Mapping[str, Term] | None = None,
) -> Mechanism:
    """A mechanism without state from `(plan, signals, key) -> plan`.

    Args:
      function: what it does; "key: consumed".
      outputs: what it needs scored besides the log-probability.
      terms: the differentiable quantities it may raise.
    """
    return Mechanism(_no_state, _Stateless(function), outputs, terms or {})


@dataclasses.dataclass(frozen=True)
class _Penalty:
    function: Callable[[Quantities, Signals], Array]
    names: tuple[str, ...]

    def __call__(self, plan: Plan, signals: Signals, key: Array) -> Plan:
        del key
        scores = {name: signals.scores[name] for name in self.names}
        value, gradient = jax.value_and_grad(self.function)(scores, signals)
        for name in self.names:
            plan = plan.raise_term(name, gradient[name])
        return plan.report(actor__penalty=(value, jnp.ones_like(value)))


def penalty(function: Callable[[Quantities, Signals], Array], *, outputs: tuple[Output, ...]) -> Mechanism:
    """Adds any scalar formula F of batch statistics to the loss, by its exact linearisation.

    F may depend on all tokens at once, such as `(mean entropy - target)²`, which is not a sum over tokens. At the
    plan's scores its gradient is `∂F/∂f_t` per token, so the loss gets `Σ_t ∂F/∂f_t · f_t(θ)`: the same gradient as F
    itself, exact for any number of micro-batches. Coefficients are added as they are: F holds its own denominators.

    Args:
      function: `({output name: [B, T]}, signals) -> scalar`; must use `signals.batch.loss_mask`.
      outputs: the quantities that F reads.
    """
    names = tuple(str(output) for output in outputs)
    return stateless(_Penalty(function, names), outputs=outputs, terms={name: quantity(name) for name in names})


def _num_blocks(num_rows: int, rows: int) -> int:
    if num_rows % rows:
        raise ValueError(f"rows = {rows} does not divide the {num_rows} rows of the update batch")
    return num_rows // rows


def _split(tree: Any, rows: int) -> Any:
    def split(x: Array) -> Array:
        return x.reshape((_num_blocks(x.shape[0], rows), rows, *x.shape[1:]))

    return jax.tree.map(split, tree)


def _join(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.reshape((-1, *x.shape[2:])), tree)


@dataclasses.dataclass(frozen=True)
class _Blockwise:
    update: Callable[..., tuple[Plan, State]]
    rows: int

    def __call__(self, plan: Plan, state: State, signals: Signals, key: Array) -> tuple[Plan, State]:
        batch, scores = _split((signals.batch, dict(signals.scores)), self.rows)
        rowwise = _split(plan.replace(metrics={}, terms={}), self.rows)
        num_blocks = _num_blocks(plan.advantage.shape[0], self.rows)

        def block(carry: tuple[State, Array], xs: Any) -> tuple[tuple[State, Array], Any]:
            block_state, index = carry
            block_plan, block_batch, block_scores = xs
            block_signals = signals.replace(batch=block_batch, scores=block_scores)
            new_plan, block_state = self.update(block_plan, block_state, block_signals, jax.random.fold_in(key, index))
            return (block_state, index + 1), (new_plan.replace(metrics={}), new_plan.metrics)

        (state, _), (blocks, metrics) = jax.lax.scan(block, (state, jnp.int32(0)), (rowwise, batch, scores))
        joined = _join(blocks)
        result = joined.replace(terms=plan.terms, metrics={**plan.metrics, **jax.tree.map(jnp.sum, metrics)})
        for name, coefficient in joined.terms.items():
            result = result.raise_term(name, coefficient / num_blocks)
        return result, state


def blockwise(mechanism: Mechanism, *, rows: int) -> Mechanism:
    """Runs a mechanism on blocks of `rows` consecutive rows, as released code does on its micro-batches.

    For fidelity studies only: statistics, selections and denominators are each block's own, and coefficients of
    terms are divided by the number of blocks, as a mean over micro-batches is. The state passes from block to block.
    The result depends on the order of rows: that is the released behaviour, and the reason not to use it otherwise.
    Terms that were raised before are not shown to the blocks.

    Args:
      mechanism: what to run.
      rows: rows per block; must divide the update batch (checked when traced).

    Raises:
      ValueError: `rows` is not positive or does not divide the batch.
    """
    require(rows >= 1, "rows", rows, "at least 1")
    return mechanism._replace(update=_Blockwise(mechanism.update, rows))


@dataclasses.dataclass(frozen=True)
class _BlockwiseNormaliser:
    normaliser: Normaliser
    rows: int

    def __call__(self, counted: Array, batch: Rollouts) -> Array:
        chex.assert_rank(counted, 2)
        weight = jax.vmap(self.normaliser)(*_split((counted, batch), self.rows))
        return _join(weight) / _num_blocks(counted.shape[0], self.rows)


@functools.lru_cache
def blockwise_normaliser(normaliser: Normaliser, *, rows: int) -> Normaliser:
    """The normaliser on blocks of `rows` consecutive rows, divided by the number of blocks: a mean of means.

    The denominators of code that averages its loss over micro-batches. See `blockwise`.
    """
    require(rows >= 1, "rows", rows, "at least 1")
    return _BlockwiseNormaliser(normaliser, rows)
