"""What the token atlas shows of a kept rollout: numbers of its tokens, as arrays on the host, and their text.

If the state of the step was kept and the run's config builds it, the rollout is scored and estimated anew, as its step
did, and the chain of mechanisms is run on it as a whole, before the first update. Else only what the file holds is
shown.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jentropy import compose
from jentropy import config as config_lib
from jentropy.base import ENTROPY, LOG_PROB, Rollouts, Signals, initial_plan
from jentropy.data.tokenizer import Tokenizer
from jentropy.train.checkpoint import CheckpointError
from jentropy.train.kept import Kept, KeptError, kept_steps, load_kept, load_rollouts
from jentropy.train.quarantine import Batch
from jentropy.train.scoring import make_scorer, score_rows
from jentropy.train.step import select_valid

FloatArray = NDArray[np.float64]
TOUCHED = "touched/"
"""How the names of the marks in `token_data` begin."""


_WHOLE = "mechanisms were run on the whole rollout at once, as before its first update"


class Tokens(NamedTuple):
    """One rollout of B rows and T columns.

    Attributes:
      step: its number.
      tokens: `[B, T]` ids.
      mask: `[B, T]` bool, response tokens.
      rewards: `[B, R]`, NaN where a grader abstained.
      graders: R names; `reward` if there is only one.
      group: `[B]`.
      values: `[B, T]` by name: `entropy` or, where it is not known, `surprise` (minus log-probability); `covariance`
        and `advantage` where they are known.
      touched: `[B, T]` bool by the mechanism's name.
      remarks: what is not known, in sentences.
    """

    step: int
    tokens: NDArray[np.int64]
    mask: NDArray[np.bool_]
    rewards: FloatArray
    graders: tuple[str, ...]
    group: NDArray[np.int64]
    values: Mapping[str, FloatArray]
    touched: Mapping[str, NDArray[np.bool_]]
    remarks: tuple[str, ...]


def load_tokens(run: Path, step: int) -> Tokens:
    """A kept rollout with all that can be known of its tokens.

    Raises:
      KeptError: the step is not kept, or its arrays are not what was written.
    """
    batch, description = load_rollouts(run, step)
    names = description.get("rewards")
    try:
        values, touched = _recomputed(load_kept(run, step))
    except (KeptError, CheckpointError, config_lib.ConfigError, OSError, ImportError) as error:
        return _tokens(step, batch, names, {}, {}, (f"the state of the step could not be used ({error})",))
    return _tokens(step, batch, names, values, touched, (_WHOLE,) if touched else ())


def _tokens(
    step: int, batch: Batch, names: Any, values: Mapping[str, Any], touched: Mapping[str, Any],
    remarks: tuple[str, ...],
) -> Tokens:  # fmt: skip
    rows = batch.rollouts
    mask = np.asarray(rows.loss_mask, bool)
    stored = {name: rows.token_data[name] for name in ("entropy", "advantage") if name in rows.token_data}
    marks = {n.removeprefix(TOUCHED): np.asarray(v) != 0 for n, v in rows.token_data.items() if n.startswith(TOUCHED)}
    known = {name: np.asarray(value, np.float64) for name, value in {**stored, **values}.items()}
    log_prob = known.pop("log_prob", np.asarray(rows.logp_old, np.float64))
    if "entropy" not in known:
        known["surprise"] = -log_prob
    if "advantage" in known and mask.any():
        known["covariance"] = _covariance(log_prob, known["advantage"], mask)
    reward = np.asarray(rows.rewards, np.float64)
    named = isinstance(names, list) and len(names) == reward.shape[1] > 1
    graders = tuple(map(str, names)) if named else tuple(f"reward {i + 1}" for i in range(reward.shape[1]))
    graders = ("reward",) if len(graders) == 1 else graders
    valid = np.asarray(rows.row_data.get("reward_is_valid", np.ones(reward.shape)), bool).reshape(reward.shape)
    return Tokens(
        step,
        np.asarray(rows.tokens, np.int64),
        mask,
        np.where(valid, reward, np.nan),
        graders,
        np.asarray(rows.group, np.int64),
        {name: np.where(mask, value, np.nan) for name, value in known.items()},
        {name: np.asarray(value, bool) & mask for name, value in {**marks, **touched}.items()},
        remarks,
    )


def _covariance(x: FloatArray, y: FloatArray, mask: NDArray[np.bool_]) -> FloatArray:
    """Each token's part of the covariance: the product of the deviations from the means over all response tokens."""
    return (x - x[mask].mean()) * (y - y[mask].mean())


def _recomputed(kept: Kept) -> tuple[dict[str, Any], dict[str, Any]]:
    """Entropy, log-probability and advantage of the tokens, and those that each part of the chain touches."""
    stage = kept.stage
    objective, num = stage.objective, stage.num_microbatches
    outputs = tuple(dict.fromkeys((LOG_PROB, ENTROPY, *objective.mechanisms.outputs)))
    scorer = make_scorer(kept.policy, outputs, objective.temperature)
    reference = make_scorer(kept.policy, (LOG_PROB,), objective.temperature) if stage.reference else None
    end = None if stage.eos_in_loss else kept.experiment.task.tokenizer.eos_id

    @jax.jit
    def compute(state: Any, rows: Rollouts) -> tuple[dict[str, Any], dict[str, Any]]:
        if end is not None:
            rows = rows.replace(loss_mask=rows.loss_mask & (rows.tokens != end))
        rows = select_valid(rows)
        if reference is not None:
            found = score_rows(reference, state.frozen["reference"], {}, rows, num)
            rows = rows.replace(token_data={**rows.token_data, "ref_log_prob": found["log_prob"]})
        scores = score_rows(scorer, state.params, state.frozen, rows, num)
        rows = rows.replace(logp_old=scores["log_prob"])
        advantage, added, _, _ = objective.estimator.estimate(rows, state.estimator_state)
        rows = rows.replace(token_data={**rows.token_data, **added})
        signals = Signals(batch=rows, scores=scores, step=state.step, update_index=jnp.int32(0))
        plan, key = initial_plan(rows, advantage), jax.random.fold_in(state.key, state.step)
        touched = compose.walk(objective.mechanisms.update, plan, state.mechanism_state, signals, key)[2]
        return {**{name: scores[name] for name in ("entropy", "log_prob")}, "advantage": advantage}, touched

    return jax.device_get(compute(kept.state, kept.placed()))


def run_tokenizer(run: Path) -> Tokenizer:
    """The tokenizer of a run's task.

    Raises:
      ConfigError, OSError, ImportError: the config in the folder cannot be read or builds no task.
    """
    return config_lib.build(config_lib.load(run / "config.json").task).tokenizer


class Decoder:
    """Text of single tokens; ids in brackets where there is no tokenizer, or where it knows none.

    Args:
      tokenizer: None for ids.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer, self._known = tokenizer, {}

    def __call__(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = self._decode(token)
        return self._known[token]

    def _decode(self, token: int) -> str:
        tokenizer = self._tokenizer
        if tokenizer is None or not 0 <= token < tokenizer.vocab_size:
            return f"[{token}]"
        special = {tokenizer.pad_id: "‹pad›", tokenizer.eos_id: "‹end›"}
        shown = tokenizer.decode_rows(np.array([[token]]), np.ones((1, 1), bool))[0]
        return shown or special.get(token, f"[{token}]")


__all__ = ["Decoder", "Tokens", "kept_steps", "load_tokens", "run_tokenizer"]
