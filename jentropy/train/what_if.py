"""What would other methods do with this batch? From one kept rollout and state, without training.

For every method the direction of one update over the whole rollout, in one compiled program with one forward pass: its
gradient, the change dθ of the parameters that the optimizer would make from its moments in the run, the entropy change
that dθ predicts to first order (`entropy_derivative`), the cosines of both directions to those of plain GRPO, and the
share of tokens that each mechanism touched. The run's own method and plain GRPO are always among them.

Limits. It is the first update of a rollout, so the ratio is 1: what acts through the ratio alone, clipping and KL-Cov,
has no effect there, although it marks its tokens as touched; and neither has a controller that has yet to see this
rollout's entropy. dθ carries Adam's momentum, most of which is the run's past. And a prediction is a first order.
`measure=True` holds it against the truth: each method makes its real updates from the same state, and the entropy
change on the states of the rollout is measured.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fiddle as fdl
import jax
import jax.numpy as jnp
import numpy as np

from jentropy.advantages.grpo import grpo
from jentropy.base import Objective, require
from jentropy.compose import chain
from jentropy.mechanisms.clip_range import clip_range
from jentropy.normalisers import token_mean
from jentropy.report.tables import table
from jentropy.surrogates import ratio
from jentropy.train.directions import make_directions, make_measure
from jentropy.train.experiment import Reinforce
from jentropy.train.kept import Kept, KeptError, load_kept
from jentropy.train.metrics import divide
from jentropy.train.other_method import other_stage, state_under
from jentropy.train.quarantine import SKIPPED
from jentropy.train.replay import is_own
from jentropy.train.state import TrainState
from jentropy.train.step import StepSpec, make_train_step
from jentropy.train.stepper import stage_spec

GRPO = "grpo"
"""The name of plain GRPO: a token mean, the ratio clipped at 0.2."""


class Method(NamedTuple):
    """A method under the conditions of a kept step.

    Attributes:
      name: of its config.
      stage: the step's, with this method.
      state: the step's, for this method.
    """

    name: str
    stage: Reinforce
    state: TrainState


class Outcome(NamedTuple):
    """What one update by a method would do.

    Attributes:
      name: of the method.
      loss: before the update.
      gradient_norm: before clipping.
      predicted: mean change of the entropy over the rollout's tokens, to first order in dθ, nats.
      cosine_gradient, cosine_update: between its gradient, and dθ, and those of plain GRPO; None where one is 0.
      touched: share of the rollout's tokens by the name of the mechanism that changed a coefficient there; one that
        sets bounds of the ratio, as `clip_range` does, touches all.
      measured: the same mean after the method's real updates, nats; None if not asked for.
      predicted_tokens: `[B, T]`, `predicted` by token, 0 outside the loss mask.
    """

    name: str
    loss: float
    gradient_norm: float
    predicted: float
    cosine_gradient: float | None
    cosine_update: float | None
    touched: Mapping[str, float]
    measured: float | None
    predicted_tokens: np.ndarray


class WhatIf(NamedTuple):
    """What some methods would do with one batch.

    Attributes:
      step: the rollout's number.
      stage: name of its stage.
      num_tokens: of the rollout's responses.
      entropy: their mean entropy before, nats.
      updates: of the measured steps by method; empty if nothing was measured.
      outcomes: by method, plain GRPO first, the run's own second.
      rank_agreement: Spearman's correlation of predicted and measured changes; None if not measured, or if fewer than
        three methods differ.
    """

    step: int
    stage: str
    num_tokens: int
    entropy: float
    updates: Mapping[str, int]
    outcomes: tuple[Outcome, ...]
    rank_agreement: float | None

    def text(self) -> str:
        """The findings as lines: a table, and what may be said of it."""
        columns = {
            "name": "method", "loss": "loss", "gradient_norm": "gradient norm", "predicted": "predicted dH",
            "measured": "measured dH", "cosine_gradient": "cos(gradient)", "cosine_update": "cos(update)",
            "touched": "touched",
        }  # fmt: skip
        shown = {key: title for key, title in columns.items() if key != "measured" or self.updates}
        lines = [
            f"step {self.step} of stage {self.stage!r}: {self.num_tokens} tokens, entropy {self.entropy:.4f} nats",
            "one update over the whole rollout; dH in nats, cosines to plain GRPO, shares of tokens touched",
            table([self._row(outcome) for outcome in self.outcomes], shown),
        ]
        if self.updates:
            made = ", ".join(f"{name} {count}" for name, count in self.updates.items())
            value = "needs three methods that differ" if self.rank_agreement is None else f"{self.rank_agreement:.3f}"
            lines += [f"measured after updates: {made}", f"rank agreement of predicted and measured dH: {value}"]
        return "\n".join(lines)

    @staticmethod
    def _row(outcome: Outcome) -> dict[str, object]:
        row: dict[str, object] = dict(outcome._asdict())
        styles = dict.fromkeys(("predicted", "measured"), "{:+.3e}") | {"loss": "{:+.4g}", "gradient_norm": "{:.4g}"}
        row |= {name: style.format(row[name]) for name, style in styles.items() if row[name] is not None}
        return {**row, "touched": ", ".join(f"{name} {share:.2%}" for name, share in outcome.touched.items())}

    def to_json(self) -> dict[str, Any]:
        """All but the values by token, as JSON can hold it."""
        names = [name for name in Outcome._fields if name != "predicted_tokens"]
        methods = [{name: getattr(outcome, name) for name in names} for outcome in self.outcomes]
        return {**self._asdict(), "updates": dict(self.updates), "outcomes": methods}


def _plain_grpo(kept: Kept) -> Method:
    run = kept.stage
    objective = Objective(grpo(), chain(clip_range=clip_range()), ratio, token_mean, run.objective.temperature)
    try:
        stage = dataclasses.replace(run, objective=objective, reference=False)
    except ValueError as error:
        raise KeptError(f"plain GRPO does not fit the rollout of step {kept.step}: {error}") from error
    return Method(GRPO, stage, state_under(kept, stage))


def methods(kept: Kept, configs: Sequence[fdl.Config]) -> list[Method]:
    """Plain GRPO, the run's own method, and those of other configs, under names that differ.

    Raises:
      KeptError: a method does not fit the rollout, see `other_stage`.
      ConfigError: a config builds no experiment.
    """
    found = [_plain_grpo(kept), Method(f"{kept.experiment.name} (run)", kept.stage, kept.state)]
    for config in configs:
        names, count, name = {method.name for method in found}, 1, config.name
        while name in names:
            count += 1
            name = f"{config.name} ({count})"
        stage = other_stage(kept, config)
        found.append(Method(name, stage, state_under(kept, stage)))
    return found


def whole(kept: Kept, stage: Reinforce) -> StepSpec:
    """One update over the whole rollout, in parts of the size of training if an update is made in parts."""
    run, spec = kept.stage, stage_spec(kept.experiment, stage, kept.policy)
    parts = 1 if run.num_microbatches == 1 else run.num_minibatches * run.num_microbatches
    return spec._replace(num_minibatches=1, num_epochs=1, num_microbatches=parts, ledger=None)


def several(kept: Kept, stage: Reinforce, updates: int | None) -> StepSpec:
    """The updates of a real step: the stage's, or `updates` over its minibatches or, where they do not divide, all."""
    spec = stage_spec(kept.experiment, stage, kept.policy)._replace(ledger=None)
    if updates is None:
        return spec
    cut = stage.num_minibatches if updates % stage.num_minibatches == 0 else 1
    parts = stage.num_microbatches * stage.num_minibatches // cut if stage.num_microbatches > 1 else 1
    return spec._replace(num_minibatches=cut, num_epochs=updates // cut, num_microbatches=parts)


def _measured(kept: Kept, method: Method, spec: StepSpec) -> float:
    """The entropy change on the tokens of the rollout that the method's real updates make, nats."""
    train_step = make_train_step(spec, kept.stage.num_groups, kept.mesh)
    rollouts = kept.placed()
    after, metrics = train_step(jax.tree.map(jnp.copy, method.state), rollouts)
    if divide(jax.device_get(metrics)).get(SKIPPED, 0.0) > 0:
        raise KeptError(f"{method.name}: an update of step {kept.step} is skipped, its loss or gradient is not finite")
    change = make_measure(whole(kept, kept.stage), kept.mesh)(kept.state.params, after.params, rollouts)
    return float(jax.device_get(change))


def rank_agreement(predicted: Sequence[float], measured: Sequence[float]) -> float | None:
    """Spearman's rank correlation; equal pairs count once, ties share their mean rank.

    Returns:
      In [-1, 1]; None for fewer than three pairs, or if one side is constant.

    >>> rank_agreement([0.1, 0.2, 0.3], [1.0, 3.0, 2.0])
    0.5
    """
    pairs = sorted(set(zip(predicted, measured, strict=True)))
    if len(pairs) < 3:
        return None
    ranks = [_ranks(np.asarray(values)) for values in zip(*pairs, strict=True)]
    a, b = (rank - rank.mean() for rank in ranks)
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale > 0 else None


def _ranks(x: np.ndarray) -> np.ndarray:
    return np.asarray([(x < value).sum() + ((x == value).sum() - 1) / 2 for value in x])


def _check(kept: Kept, method: Method, found: Mapping[str, Any], at: int) -> None:
    """Raises `KeptError` if the method has no direction on this batch."""
    for name, (total, _) in found["errors"][at].items():
        if total != 0:
            raise KeptError(f"{method.name}, step {kept.step}: {name.removeprefix('error/')}: {float(total):g}")
    numbers = {"loss": found["loss"][at], "gradient": found["gradient_norm"][at], "dH": found["predicted"][at]}
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise KeptError(f"{method.name}, step {kept.step}: its {name} is {float(value)}")


def _outcome(name: str, found: Mapping[str, Any], at: int, measured: float | None) -> Outcome:
    gradient, update = (float(found[f"cosine_{of}"][at]) for of in ("gradient", "update"))
    return Outcome(
        name=name,
        loss=float(found["loss"][at]),
        gradient_norm=float(found["gradient_norm"][at]),
        predicted=float(found["predicted"][at]),
        cosine_gradient=None if math.isnan(gradient) else gradient,
        cosine_update=None if math.isnan(update) else update,
        touched={mechanism: float(share) for mechanism, share in found["touched"][at].items()},
        measured=measured,
        predicted_tokens=found["predicted_tokens"][at],
    )


def what_if(
    run: str | Path, step: int, configs: Sequence[fdl.Config] = (), *, measure: bool = False, updates: int | None = None
) -> WhatIf:
    """What the methods of some configs would do with a kept rollout; nothing in the run's folder is changed.

    Args:
      run: the run's folder.
      step: number of a kept rollout.
      configs: their methods are compared, see `other_method.TAKEN` for what is theirs; the run's own config is needed
        among them only if it uses functions that are not jentropy's.
      measure: make each method's real updates too, and measure the entropy change.
      updates: how many real updates, at least 1; None for those of each config. Minibatches are the config's if they
        divide the number, else each update is over the whole rollout.

    Raises:
      ValueError: `updates` is not positive.
      KeptError: a method does not fit the rollout, or its loss or gradient is not finite.
      FileNotFoundError, CorruptCheckpointError, ConfigError: see `load_kept`.
    """
    if updates is not None:
        require(updates >= 1, "updates", updates, "at least 1")
    own = [config for config in configs if is_own(run, config)]
    kept = load_kept(run, step, own[0] if own else None)
    chosen = methods(kept, [config for config in configs if config not in own])
    specs = tuple(whole(kept, method.stage) for method in chosen)
    program = make_directions(specs, whole(kept, kept.stage), kept.mesh)
    found = jax.device_get(program(tuple(method.state for method in chosen), kept.placed()))
    if found["count"] == 0:
        raise KeptError(f"the rollout of step {step} has no token to train on")
    for at, method in enumerate(chosen):
        _check(kept, method, found, at)
    steps = [several(kept, method.stage, updates) for method in chosen] if measure else []
    measured = [_measured(kept, method, spec) for method, spec in zip(chosen, steps, strict=False)]
    outcomes = tuple(
        _outcome(method.name, found, at, measured[at] if measure else None) for at, method in enumerate(chosen)
    )
    return WhatIf(
        step=step,
        stage=kept.stage.name,
        num_tokens=int(found["count"]),
        entropy=float(found["entropy"]),
        updates={method.name: spec.num_updates for method, spec in zip(chosen, steps, strict=False)},
        outcomes=outcomes,
        rank_agreement=rank_agreement([one.predicted for one in outcomes], measured) if measure else None,
    )
