"""Combinations of methods that are refused or warned about, with the reason, when an experiment is built.

Everything not listed here composes: mechanisms read and write one plan, in the order of their chain. Methods are known
by the module that defines them, so nothing is registered.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

from jentropy import normalisers, surrogates
from jentropy.advantages.grpo import grpo
from jentropy.advantages.qae import qae
from jentropy.base import Objective
from jentropy.compose import Part, parts


class Conflict(NamedTuple):
    """What does not go together, and why; `refused` if it has no meaning, else it is most likely a mistake."""

    reason: str
    refused: bool = False


class _Chain(NamedTuple):
    """An objective, the mechanisms of it in order, the modules of its estimator and of the rollout's strategy."""

    parts: tuple[Part, ...]
    estimator: str
    objective: Objective
    strategy: str = ""

    def count(self, *methods: str) -> int:
        return sum(part.method in methods for part in self.parts)

    def comes_after(self, one: str, other: str) -> bool:
        """Whether some mechanism `one` stands behind some `other`."""
        order = [part.method for part in self.parts]
        return one in order and other in order and len(order) - order[::-1].index(one) - 1 > order.index(other)


_REGULATORS = ("adaptive_entropy", "entropy_band", "siren")
_ADVANTAGE = ("entropy_advantage", "semantic_entropy")
_SELECTORS = ("clip_cov", "kl_cov", "steer", "ce_gppo")
_WITHOUT_STD = [grpo(scale_rewards="none", singleton=single).estimate for single in ("zero", "raw")]
_WITHOUT_STD += [qae(scale_rewards="none", baseline=baseline).estimate for baseline in ("paper", "linear", "lower")]
_GSPO: type = type(surrogates.gspo())
_DUAL_CLIP: type = type(surrogates.dual_clip())


def _two_of_a_kind(chain: _Chain) -> Conflict | None:
    methods = [part.method for part in chain.parts]
    twice = sorted({m for m in methods if methods.count(m) > 1 and m in (*_REGULATORS, *_SELECTORS, "top_entropy")})
    return Conflict(f"{twice[0]} stands in the chain twice", refused=True) if twice else None


def _two_regulators(chain: _Chain) -> Conflict | None:
    found = [method for method in _REGULATORS if chain.count(method)]
    if len(found) < 2:
        return None
    return Conflict(f"{found[1]} and {found[0]} both steer the entropy to a target of their own", refused=True)


def _bonus_beside_a_regulator(chain: _Chain) -> Conflict | None:
    if not (chain.count("entropy_bonus") and chain.count(*_REGULATORS)):
        return None
    return Conflict("a fixed entropy_bonus pulls the entropy away from the target of the regulator beside it")


def _bounds_after_their_readers(chain: _Chain) -> Conflict | None:
    late = [m for m in ("clip_cov", "ce_gppo") if chain.comes_after("clip_range", m)]
    if not late:
        return None
    return Conflict(f"clip_range stands behind {late[0]}, which reads its bounds: put clip_range first", refused=True)


def _clipping_after_kl_cov(chain: _Chain) -> Conflict | None:
    if not chain.comes_after("clip_range", "kl_cov"):
        return None
    return Conflict("clip_range behind kl_cov clips the ratio again, which KL-Cov as published does not")


def _advantage_after_its_readers(chain: _Chain) -> Conflict | None:
    late = [(a, s) for a in _ADVANTAGE for s in _SELECTORS if chain.comes_after(a, s)]
    if not late:
        return None
    shaping, reader = late[0]
    return Conflict(f"{shaping} stands behind {reader}, which has already read the advantage: put {shaping} before it")


def _no_bounds_to_preserve(chain: _Chain) -> Conflict | None:
    if not chain.count("ce_gppo") or chain.count("clip_range"):
        return None
    return Conflict("ce_gppo without a clip_range before it does nothing: no token is clipped")


def _two_covariance_methods(chain: _Chain) -> Conflict | None:
    if not (chain.count("clip_cov") and chain.count("kl_cov")):
        return None
    return Conflict("clip_cov and kl_cov act on the same tokens, those of large covariance")


def _unstandardised_band(chain: _Chain) -> Conflict | None:
    flat = chain.estimator in ("rloo", "reinforce", "remax", "opo", "raft")
    flat |= chain.objective.estimator.estimate in _WITHOUT_STD
    if not (flat and chain.count("clip_cov")):
        return None
    return Conflict(
        "clip_cov's band of covariances is absolute and meant for standardised advantages: with this estimator few "
        "tokens or none may reach it"
    )


def _sequence_ratio(chain: _Chain) -> Conflict | None:
    is_gspo = isinstance(chain.objective.surrogate, _GSPO)
    if not is_gspo and chain.objective.surrogate is not surrogates.sequence_ratio:
        return None
    if chain.objective.normaliser is not normalisers.sequence_mean_token_mean:
        return Conflict("gspo and sequence_ratio are defined with the normaliser sequence_mean_token_mean")
    if not is_gspo:
        return None
    wide = [p for p in chain.parts if p.method == "clip_range" and 0.05 < float(p.state.epsilon_high) < float("inf")]
    if not wide:
        return None
    return Conflict(
        f"clip_range(epsilon_high={float(wide[0].state.epsilon_high):g}) does not clip the ratio of a whole response: "
        "GSPO's values are 3e-4 and 4e-4"
    )


def _penalty_on_another_ratio(chain: _Chain) -> Conflict | None:
    surrogate = chain.objective.surrogate
    token_ratio = surrogate is surrogates.ratio or isinstance(surrogate, _DUAL_CLIP)
    if token_ratio or not chain.count("kl_cov", "clip_cov", "ce_gppo"):
        return None
    return Conflict("clip_cov, kl_cov and ce_gppo are defined for surrogates.ratio and dual_clip")


def _values_without_a_reader(chain: _Chain) -> Conflict | None:
    if chain.strategy != "vine" or "prefix_value" in chain.objective.estimator.requires:
        return None
    return Conflict("the strategy Vine(...) samples for nothing: the estimator does not read prefix_value")


def _estimator_without_forks(chain: _Chain) -> Conflict | None:
    if chain.estimator != "fr3e" or chain.strategy == "fr3e":
        return None
    return Conflict("fr3e without its strategy, Fr3e(...), has no state but the prompts")


_RULES: Sequence[Callable[[_Chain], Conflict | None]] = (
    _two_of_a_kind,
    _two_regulators,
    _bonus_beside_a_regulator,
    _bounds_after_their_readers,
    _clipping_after_kl_cov,
    _advantage_after_its_readers,
    _no_bounds_to_preserve,
    _two_covariance_methods,
    _unstandardised_band,
    _sequence_ratio,
    _penalty_on_another_ratio,
    _values_without_a_reader,
    _estimator_without_forks,
)


def find(objective: Objective, strategy: object | None = None) -> list[Conflict]:
    """What in an objective does not go together, or not with the strategy of its rollouts.

    Args:
      objective: the method.
      strategy: of the rollouts; None for independent responses.
    """
    estimator = objective.estimator.estimate.__module__.rpartition(".")[2]
    forks = "" if strategy is None else type(strategy).__module__.rpartition(".")[2]
    chain = _Chain(parts(objective.mechanisms), estimator, objective, forks)
    found = (rule(chain) for rule in _RULES)
    return [conflict for conflict in found if conflict is not None]


def check(objective: Objective, where: str, strategy: object | None = None) -> None:
    """Raises for a refused combination, warns of the others.

    Args:
      objective: the method.
      where: what messages begin with.
      strategy: see `find`.

    Raises:
      ValueError: a combination is refused; says why.
    """
    for conflict in find(objective, strategy):
        if conflict.refused:
            raise ValueError(f"{where}: {conflict.reason}")
        warnings.warn(f"{where}: {conflict.reason}", stacklevel=3)
