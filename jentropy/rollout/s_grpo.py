"""S-GRPO's rollouts: one thought per prompt, and answers that are asked for at several points of it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jentropy import tree
from jentropy.base import Array, Metrics, Rollouts, require
from jentropy.data.source import Prompts
from jentropy.data.task import Task
from jentropy.data.thoughts import Thought
from jentropy.rollout.forks import Prefixes
from jentropy.rollout.strategy import Tools, concatenate

_EXITS = 2**32 - 1
"""What is folded in for the places of exits: no `row_id`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SerialExits:
    """Stops the thought of each response at m = `num_generations` - 1 places and has the answer given there.

    The rows of a group are m exits, earliest first, and the full response, last: `row_data["exit_order"]`. The places
    are drawn without replacement among the tokens of the thought (`Task.thought`); an exit keeps those up to its place,
    and there follow the tokens that ask for the answer (`Task.exit_inducer`), which nobody samples, and the sampled
    answer. A response whose thought has not ended, or has fewer places than exits with room for an answer behind them,
    is dropped: its group is padding.

    Where the tokens of the thought and those that ask for the answer are in the loss mask, `logp_sampler` is the
    trainer's score: of them no sampler's probability is known that would differ.

    Attributes:
      loss_on_prefix: the loss of an exit covers the tokens of the thought.
      loss_on_inducer: and those that ask for the answer. Without both only the answer is trained on; the objective as
        it is written sums over all of them.

    Reference: 2505.07686, from a third party's notes and implementation.
    """

    loss_on_prefix: bool = True
    loss_on_inducer: bool = True

    @property
    def provides(self) -> tuple[str, ...]:
        """See `Strategy`."""
        return ("prefix_length", "exit_order")

    @property
    def refuses(self) -> tuple[str, ...]:
        """See `Strategy`."""
        return ("answer_id", "greedy_reward")

    def num_groups(self, num_prompts: int) -> int:
        """See `Strategy`."""
        return num_prompts

    def num_roots(self, num_generations: int) -> int:
        """See `Strategy`."""
        del num_generations
        return 1

    def num_continuations(self, num_generations: int) -> int:
        """See `Strategy`."""
        del num_generations
        return 1

    def check(self, num_generations: int, task: Task) -> None:
        """Raises `ValueError` if there is no exit, or the task does not say what a thought is and how it is ended."""
        require(num_generations >= 2, "num_generations", num_generations, "at least 2: an exit and the full response")
        for name, value in (("thought", task.thought), ("exit_inducer", task.exit_inducer)):
            require(bool(value), f"the {name} of task {task.name!r}", value, "given, for exits from a thought")
        room = task.max_new_tokens - len(task.exit_inducer) - 1
        rule = f"at most {room} + 1, the places of exits in {task.max_new_tokens} tokens"
        require(num_generations - 1 <= room, "num_generations", num_generations, rule)

    def __call__(
        self, roots: Rollouts, entropy: Array, prompts: Prompts, task: Task, tools: Tools
    ) -> tuple[Rollouts, Metrics]:
        """See `Strategy`."""
        del entropy
        assert task.thought is not None, "check() was not called"
        num_prompts, inducer = len(prompts.length), task.exit_inducer
        num_exits = tools.num_generations - 1
        static = num_exits, task.max_new_tokens, inducer, task.thought
        (prefixes, enough), metrics = tools.run(exits, static, roots, tools.key, tools.index)
        owner = np.repeat(np.arange(num_prompts, dtype=np.int32), num_exits)
        grown = tools.grow(prefixes, owner, num_prompts)
        rows, padded = tools.run(gather, (self, num_exits, len(inducer)), roots, grown, enough)
        if self.loss_on_prefix or self.loss_on_inducer:
            rows, _ = tools.run(with_scores, None, rows, tools.score(rows))
        return rows, {**metrics, **padded}


def exits(
    static: tuple[int, int, tuple[int, ...], Thought], roots: Rollouts, key: Array, index: Array
) -> tuple[tuple[Prefixes, Array], Metrics]:
    """The prefixes of all exits, root after root, earliest first; which roots have enough places for them, `[B]` bool.

    Reports `rollout/dropped_fraction` of the roots, those that have not.

    Args:
      static: exits per root, the longest response, the tokens that ask for the answer, what a thought is.
      roots: B rows.
      key, index: see `Tools`.
    """
    num_exits, max_new_tokens, inducer, thought = static
    column = jnp.arange(roots.tokens.shape[1], dtype=jnp.int32)[None, :]
    last = roots.fork + max_new_tokens - 2 - len(inducer)  # then there is a token left to answer with
    places = thought(roots.tokens, roots.loss_mask) & (column <= last[:, None]) & roots.row_data["is_valid"][:, None]
    key = jax.random.fold_in(jax.random.fold_in(key, index), np.uint32(_EXITS))
    row_key = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, roots.row_id)
    drawn = jax.vmap(lambda k: jax.random.uniform(k, (column.size,), jnp.float32))(row_key)
    columns, found = tree.select_anchors(drawn, places, num_exits)
    enough = jnp.all(found, axis=1)
    rows, is_valid = jax.tree.map(lambda x: jnp.repeat(x, num_exits, axis=0), (roots, enough))
    begin = jnp.where(is_valid, columns.reshape(-1) + 1, rows.fork)
    place = column - begin[:, None]
    asked = jnp.asarray(inducer, jnp.int32)[jnp.clip(place, 0, len(inducer) - 1)]
    prefixes = Prefixes(
        tokens=jnp.where(place < 0, rows.tokens, asked),
        length=jnp.minimum(begin + len(inducer), column.size - 1),
        prompt_length=rows.fork,
        parent=rows.row_id,
        is_valid=is_valid,
    )
    dropped = jnp.sum(~enough, dtype=jnp.float32), jnp.float32(enough.shape[0])
    return (prefixes, enough), {"rollout/dropped_fraction": dropped}


def gather(
    static: tuple[SerialExits, int, int], roots: Rollouts, grown: Rollouts, enough: Array
) -> tuple[Rollouts, Metrics]:
    """The groups of all prompts: their full responses, then their exits.

    Args:
      static: the strategy, exits per root, how many tokens ask for the answer.
      roots: B rows.
      grown: their exits, as `exits` orders them.
      enough: `[B]` bool, which roots have exits.
    """
    strategy, num_exits, num_asked = static
    num_roots = roots.row_id.shape[0]
    column = jnp.arange(roots.tokens.shape[1], dtype=jnp.int32)[None, :]
    begin, end = (grown.fork - grown.row_data["prefix_length"])[:, None], grown.fork[:, None]
    asked = (column >= end - num_asked) & (column < end)
    thought = (column >= begin) & (column < end - num_asked)
    forced = (thought & strategy.loss_on_prefix) | (asked & strategy.loss_on_inducer)
    has_exits = jnp.repeat(enough, num_exits)[:, None]
    token_data: dict[str, Any] = dict(grown.token_data)
    if "temperature" in token_data:
        own = jnp.repeat(roots.token_data["temperature"], num_exits, axis=0)
        token_data["temperature"] = jnp.where(thought, own, token_data["temperature"])
    order = jnp.arange(num_roots * num_exits, dtype=jnp.int32) % num_exits
    grown = grown.replace(
        loss_mask=grown.loss_mask | (forced & has_exits),
        group=grown.group // num_exits,
        token_data=token_data,
        row_data={**grown.row_data, "exit_order": order},
    )
    whole = roots.row_data
    roots = roots.replace(
        loss_mask=roots.loss_mask & enough[:, None],
        row_data={
            **whole,
            "is_valid": whole["is_valid"] & enough,
            "truncated": whole["truncated"] & enough,
            "prefix_length": jnp.zeros_like(roots.row_id),
            "exit_order": jnp.full_like(roots.row_id, num_exits),
        },
    )
    return concatenate(roots, grown)


def with_scores(static: None, rows: Rollouts, score: Array) -> tuple[Rollouts, Metrics]:
    """The rows with the trainer's score `[B, T]` as the sampler's where a token in the loss mask was not sampled."""
    del static
    column = jnp.arange(rows.tokens.shape[1], dtype=jnp.int32)[None, :]
    forced = rows.loss_mask & (column < rows.fork[:, None])
    log_prob = jnp.where(forced, score, rows.logp_sampler)
    return rows.replace(logp_sampler=log_prob, logp_old=log_prob), {}
