"""Names that users of verl and TRL know, as our functions: `loss_agg_mode` and `loss_type`.

They are for settings that come as text. In a config, import the function itself.
"""

from typing import NamedTuple

from jentropy.base import Normaliser, Surrogate, require
from jentropy.normalisers import (
    fixed_length,
    sequence_mean_token_mean,
    sequence_mean_token_sum,
    token_mean,
    token_sum,
)
from jentropy.surrogates import cispo, dual_clip, gspo, ratio

_LOSS_AGG_MODES = {
    "token-mean": token_mean,
    "token-sum": token_sum,
    "seq-mean-token-sum": sequence_mean_token_sum,
    "seq-mean-token-mean": sequence_mean_token_mean,
}
_WITH_LENGTH = "seq-mean-token-sum-norm"

_LOSS_TYPES = {"grpo": sequence_mean_token_mean, "bnpo": token_mean, "dapo": token_mean, "cispo": token_mean}
_WITH_MAX_LENGTH = "dr_grpo"


def _length(value: int | None, name: str, where: str) -> int:
    if value is None:
        raise ValueError(f"{where} needs {name}: a constant number of tokens")
    return value


def loss_agg_mode(name: str, *, length: int | None = None) -> Normaliser:
    """The normaliser that verl calls `name`.

    | verl | here |
    | :--- | :--- |
    | `token-mean` | `token_mean` |
    | `token-sum` | `token_sum` |
    | `seq-mean-token-sum` | `sequence_mean_token_sum` |
    | `seq-mean-token-mean` | `sequence_mean_token_mean` |
    | `seq-mean-token-sum-norm` | `fixed_length(length=...)` |

    Both leave rows without a counted token out of the mean. verl divides a row by its length plus 1e-8 and gives NaN
    when nothing is counted; here that is 0.

    Args:
      name: verl's `loss_agg_mode`.
      length: verl's `loss_scale_factor`, which only `seq-mean-token-sum-norm` reads. Without one verl divides by the
        padded width of the micro-batch; here it is required.

    Raises:
      ValueError: the name is unknown, or the length is missing.

    >>> loss_agg_mode("token-mean") is token_mean
    True
    >>> loss_agg_mode("seq-mean-token-sum-norm", length=512) == fixed_length(length=512)
    True
    """
    names = [*_LOSS_AGG_MODES, _WITH_LENGTH]
    require(name in names, "loss_agg_mode", name, f"one of {names}")
    if name == _WITH_LENGTH:
        return fixed_length(length=_length(length, "length", _WITH_LENGTH))
    return _LOSS_AGG_MODES[name]


class LossType(NamedTuple):
    """Two fields of an `Objective`."""

    surrogate: Surrogate
    normaliser: Normaliser


def loss_type(
    name: str,
    *,
    importance_sampling_level: str = "token",
    delta: float | None = None,
    epsilon_high: float | None = None,
    max_completion_length: int | None = None,
) -> LossType:
    """Surrogate and normaliser of what TRL calls `name`.

    | TRL | surrogate | normaliser |
    | :-- | :-------- | :--------- |
    | `grpo` | `ratio` | `sequence_mean_token_mean` |
    | `bnpo` | `ratio` | `token_mean` |
    | `dr_grpo` | `ratio` | `fixed_length(length=max_completion_length)` |
    | `dapo` (TRL's default) | `ratio` | `token_mean` |
    | `cispo` | `cispo(cap=epsilon_high)` | `token_mean` |

    A `delta` makes `ratio` a `dual_clip(clip_ratio_c=delta)`, and `importance_sampling_level="sequence"` makes it
    `gspo()`. TRL's `sapo`, `luspo` and `vespo` are not here. The bounds of the ratio are `clip_range`'s, and the
    advantage of `dr_grpo` is `grpo(scale_rewards="none")`.

    How TRL differs: `grpo` and `dr_grpo` count rows without a token, which are left out here; `bnpo` is a mean of means
    over micro-batches, here always the mean over the update, so it is `dapo`; and `dapo` divides by the tokens of the
    rollout over its number of updates, here by those of the update.

    Args:
      name: TRL's `loss_type`.
      importance_sampling_level: `"token"`, or `"sequence"` (not with `cispo`).
      delta: bound of the ratio where the advantage is negative, at least `1 + epsilon_high`; only with tokens' ratios.
      epsilon_high: with `cispo` its cap, such as 5, required (TRL's own default is `epsilon`, a cap of 0.2). Refused
        with the others, whose `epsilon_high` belongs to `clip_range`.
      max_completion_length: read by `dr_grpo` only, and required there.

    Raises:
      ValueError: a name or level is unknown, an argument is missing or does not go with the name.

    >>> loss_type("dapo").normaliser is token_mean
    True
    """
    names = [*_LOSS_TYPES, _WITH_MAX_LENGTH]
    require(name in names, "loss_type", name, f"one of {names}")
    levels = ("token",) if name == "cispo" else ("token", "sequence")
    require(
        importance_sampling_level in levels,
        "importance_sampling_level",
        importance_sampling_level,
        f"one of {list(levels)} with loss_type = {name!r}",
    )
    surrogate = ratio if importance_sampling_level == "token" else gspo()
    if delta is not None:
        require(surrogate is ratio and name != "cispo", "delta", delta, "None with cispo and with sequences")
        surrogate = dual_clip(clip_ratio_c=delta)
    if name == "cispo":
        require(epsilon_high is not None, "epsilon_high", epsilon_high, "given with loss_type = 'cispo': its cap")
        surrogate = cispo(cap=epsilon_high)
    else:
        rule = f"None with loss_type = {name!r}: set it in clip_range"
        require(epsilon_high is None, "epsilon_high", epsilon_high, rule)
    if name == _WITH_MAX_LENGTH:
        return LossType(surrogate, fixed_length(length=_length(max_completion_length, "max_completion_length", name)))
    return LossType(surrogate, _LOSS_TYPES[name])
