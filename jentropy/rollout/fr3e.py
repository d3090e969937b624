"""FR3E's rollouts: new responses from the most uncertain tokens of some of the first ones."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jentropy import outcome, tree
from jentropy.base import Array, Metrics, Rollouts, require
from jentropy.data.source import Prompts
from jentropy.data.task import Task
from jentropy.rollout.forks import Prefixes, cut
from jentropy.rollout.strategy import Tools, join

RIGHT = 0.5
"""A response is right if its first reward is above this, as in evaluations."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fr3e:
    """Forks base trajectories at K anchors each, `num_generations` rows from every one.

    The G = `num_generations` responses to a prompt are the rows of its state S_0, and the first `num_bases` of them are
    base trajectories. An anchor is a token of large entropy; the state there is what stands before it. So a rollout of
    P prompts has P (1 + `num_bases` K) groups of G rows. A response may be too short for K anchors: the rows of those
    that are missing are padding. States whose rows all earn the same are kept, because their value is needed; their
    advantage is 0.

    In the released code anchors are the tokens of lowest log-probability, K = 4, with 4 first responses, of which at
    most one that is right and one that is wrong are forked, and 16 rows per state; texts are tokenised again there,
    here the prefix is the exact tokens.

    Attributes:
      num_anchors: K.
      num_bases: base trajectories of each prompt.
      min_gap: least distance of two anchors, tokens.
      exclude_last: how many of the last tokens of a response are no anchors. The first is none either: there the prefix
        is the bare prompt.
      anchors: "entropy", or "log_prob": the sampled tokens of lowest log-probability.
      select: "first", or "one_right_one_wrong": the first right response and the first wrong one of each prompt; what
        is missing is padding. Needs `num_bases` = 2.

    Reference: 2507.07017; released code: Zheng0428/FR3E.
    """

    num_anchors: int = 4
    num_bases: int = 1
    min_gap: int = 1
    exclude_last: int = 1
    anchors: str = "entropy"
    select: str = "first"

    def __post_init__(self) -> None:
        for name, least in (("num_anchors", 1), ("num_bases", 1), ("min_gap", 1), ("exclude_last", 0)):
            require(getattr(self, name) >= least, name, getattr(self, name), f"at least {least}")
        require(self.anchors in ("entropy", "log_prob"), "anchors", self.anchors, "entropy or log_prob")
        known = self.select in ("first", "one_right_one_wrong")
        require(known, "select", self.select, "first or one_right_one_wrong")
        if self.select == "one_right_one_wrong":
            require(self.num_bases == 2, "num_bases", self.num_bases, "2 with select='one_right_one_wrong'")

    @property
    def provides(self) -> tuple[str, ...]:
        """See `Strategy`."""
        return ("prefix_length",)

    @property
    def refuses(self) -> tuple[str, ...]:
        """See `Strategy`."""
        return ("answer_id", "greedy_reward")

    def num_groups(self, num_prompts: int) -> int:
        """See `Strategy`."""
        return num_prompts * (1 + self.num_bases * self.num_anchors)

    def num_roots(self, num_generations: int) -> int:
        """See `Strategy`."""
        return num_generations

    def num_continuations(self, num_generations: int) -> int:
        """See `Strategy`."""
        return num_generations

    def check(self, num_generations: int, task: Task) -> None:
        """Raises `ValueError` if there are fewer responses than bases, or no response is long enough."""
        enough = self.num_bases <= num_generations
        require(enough, "num_bases", self.num_bases, f"at most num_generations = {num_generations}")
        room = task.max_new_tokens - 1 - self.exclude_last
        fits = (self.num_anchors - 1) * self.min_gap < room
        rule = f"so few that a response of {task.max_new_tokens} tokens has them, min_gap and exclude_last considered"
        require(fits, "num_anchors", self.num_anchors, rule)

    def __call__(
        self, roots: Rollouts, entropy: Array, prompts: Prompts, task: Task, tools: Tools
    ) -> tuple[Rollouts, Metrics]:
        """See `Strategy`."""
        del task
        num_prompts = len(prompts.length)
        prefixes, _ = tools.run(anchored, (self, num_prompts), roots, entropy)
        owner = np.repeat(np.arange(num_prompts, dtype=np.int32), self.num_bases * self.num_anchors)
        grown = tools.grow(prefixes, owner, roots.row_id.shape[0])
        return tools.run(join, num_prompts, roots, grown)


def base_rows(strategy: Fr3e, num_prompts: int, roots: Rollouts) -> tuple[Array, Array]:
    """Which rows are base trajectories, `[P, num_bases]` int32, and whether there is one, bool.

    Args:
      strategy: how they are selected.
      num_prompts: P.
      roots: row `p * G + g` is the g-th response to prompt p.
    """
    first = jnp.arange(num_prompts, dtype=jnp.int32)[:, None] * (roots.row_id.shape[0] // num_prompts)
    if strategy.select == "first":
        found = first + jnp.arange(strategy.num_bases, dtype=jnp.int32)[None, :]
        return found, jnp.ones_like(found, bool)
    valid, right = outcome.valid_rewards(roots)[:, 0], roots.rewards[:, 0] > RIGHT
    kinds = jnp.stack([valid & right, valid & ~right], axis=1).reshape((num_prompts, -1, 2))
    return first + jax.lax.argmax(kinds, 1, jnp.int32), jnp.any(kinds, axis=1)


def anchored(static: tuple[Fr3e, int], roots: Rollouts, entropy: Array) -> tuple[Prefixes, Metrics]:
    """The states at the anchors of the base trajectories: of prompt after prompt, base after base, columns ascending.

    Args:
      static: the strategy and P.
      roots: see `base_rows`.
      entropy: `[B, T]`, nats.
    """
    strategy, num_prompts = static
    rows, is_base = (x.reshape(-1) for x in base_rows(strategy, num_prompts, roots))
    bases, score = jax.tree.map(
        lambda x: x[rows], (roots, entropy if strategy.anchors == "entropy" else -roots.logp_sampler)
    )
    column = jnp.arange(score.shape[1], dtype=jnp.int32)[None, :]
    inner = bases.loss_mask & (column > bases.fork[:, None])
    settings = {"min_gap": strategy.min_gap, "exclude_last": strategy.exclude_last}
    columns, found = tree.select_anchors(score, inner, strategy.num_anchors, **settings)
    bases, is_base = jax.tree.map(lambda x: jnp.repeat(x, strategy.num_anchors, axis=0), (bases, is_base))
    return cut(bases, bases.fork, columns.reshape(-1), found.reshape(-1) & is_base), {}
