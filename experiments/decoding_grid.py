"""Temperature at high-entropy tokens against temperature elsewhere, on a policy that is not trained further.

    python experiments/decoding_grid.py --write experiments/results/decoding_grid.md

The analysis of 2506.01939, which finds that a higher temperature at the few tokens of high entropy helps and elsewhere
hurts, on the embedded task: the warm start of the LAW setting, or the newest checkpoint of a run. Two cores, about two
minutes with a new warm start.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jentropy import config as config_lib
from jentropy import embedded
from jentropy.data.source import Prompts
from jentropy.evaluation import bootstrap_interval, pass_at_k
from jentropy.policy.transformer import transformer
from jentropy.report.tables import table
from jentropy.rollout.iid import RolloutSpec
from jentropy.samplers import Sampler, entropy_temperature
from jentropy.train.checkpoint import Checkpoints
from jentropy.train.evaluate import put_prompts, total_reward
from jentropy.train.experiment import Experiment, Supervised
from jentropy.train.loop import enable_compilation_cache
from jentropy.train.programs import EVALUATION, make_rollout
from jentropy.train.sharding import make_mesh, replicated
from jentropy.train.stepper import state_template
from jentropy.train.warm_start import cached_warm_start, init_params, run_supervised

BATCH = 64
"""Prompts per call of the sampler."""


class Drawn(NamedTuple):
    """Responses to P prompts, n each: rewards `[P, n]`, entropies `[N]` of the N tokens, nats, their temperatures."""

    reward: np.ndarray
    entropy: np.ndarray
    temperature: np.ndarray


class Decoder:
    """A policy, held-out prompts and one compiled program for every setting of the sampler."""

    def __init__(self, run: Path | None, num_prompts: int, num_samples: int) -> None:
        config = embedded.law() if run is None else config_lib.load(run / "config.json")
        experiment: Experiment = config_lib.build(config)
        self._task, self._mesh = experiment.task, make_mesh(experiment.mesh)
        self._policy, warm_start = transformer(experiment.policy), experiment.stages[0]
        if run is not None:
            with Checkpoints(run / "checkpoints") as checkpoints:
                index = (checkpoints.latest_metadata() or {"stage": len(experiment.stages) - 1})["stage"]
                template = state_template(experiment, self._policy, self._mesh, index)
                self._params = checkpoints.restore(None, template)[0].params
        else:
            assert isinstance(warm_start, Supervised)

            def supervise() -> Any:
                params = init_params(self._policy, warm_start.seed, self._mesh)
                return run_supervised(warm_start, self._policy, self._task, params, self._mesh, lambda *_: None)

            self._params, _ = cached_warm_start(config, self._policy, self._mesh, supervise)
        self._prompts = self._task.prompts("heldout", experiment.evaluation.mixture).fixed(0, num_prompts)
        self._key = jax.random.fold_in(jax.random.key(experiment.seed), EVALUATION)
        tokenizer = self._task.tokenizer
        self._spec = RolloutSpec(
            num_samples, self._task.max_new_tokens, tokenizer.eos_id, tokenizer.pad_id, 1.0, self._task.rewards
        )

    def __call__(self, sampler: Sampler) -> Drawn:
        """Samples all prompts, with the same random numbers for every sampler."""
        rollout = make_rollout(self._policy, self._spec._replace(sampler=sampler), self._mesh)
        state, found = jax.device_put(sampler.init(), replicated(self._mesh)), []
        for call in range(len(self._prompts.length) // BATCH):
            part: Prompts = jax.tree.map(lambda x: x[call * BATCH : (call + 1) * BATCH], self._prompts)  # noqa: B023
            index = jax.device_put(np.int32(call), replicated(self._mesh))
            rows, entropy = rollout(self._params, self._key, index, *put_prompts(part, self._mesh), state)
            rows, entropy = jax.device_get((rows, entropy))
            reward = total_reward(self._task, rows.rewards).reshape(BATCH, -1)
            temperature = rows.token_data["temperature"][rows.loss_mask]
            found.append(Drawn(reward, entropy[rows.loss_mask], temperature))
        return Drawn(*(np.concatenate(column) for column in zip(*found)))


class Cell(NamedTuple):
    """What came of a pair of temperatures; `reward` and `solved`, pass@n, per prompt."""

    reward: np.ndarray
    solved: np.ndarray
    entropy: float
    high_fraction: float


def measure(
    decode: Callable[[Sampler], Drawn], temperatures: Sequence[float], quantile: float
) -> tuple[float, dict[tuple[float, float], Cell]]:
    """The threshold, and the cells by (temperature at high entropy, elsewhere).

    Args:
      decode: draws responses with a sampler.
      temperatures: those of both axes.
      quantile: of the entropies of tokens sampled at temperature 1: the threshold of high entropy.
    """
    plain = decode(entropy_temperature(high=1.0, low=1.0, threshold=0.0))
    threshold, cells = float(np.quantile(plain.entropy, quantile)), {}
    for high in temperatures:
        for low in temperatures:
            drawn = decode(entropy_temperature(high=high, low=low, threshold=threshold))
            correct, n = (drawn.reward > 0.5).sum(axis=1), drawn.reward.shape[1]
            is_high = float((drawn.temperature == np.float32(high)).mean()) if high != low else np.nan
            cells[high, low] = Cell(
                drawn.reward.mean(axis=1), pass_at_k(n, correct, n), float(drawn.entropy.mean()), is_high
            )
    return threshold, cells


def _grid(cells: dict[tuple[float, float], Cell], value: Callable[[Cell], object]) -> str:
    temperatures = sorted({low for _, low in cells})
    rows = [
        {"high": f"{high:g}"} | {f"{low:g}": value(cells[high, low]) for low in temperatures} for high in temperatures
    ]
    return table(rows, {"high": "at high entropy"} | {f"{low:g}": f"{low:g} elsewhere" for low in temperatures})


def _half_width(values: np.ndarray) -> float:
    low, high = bootstrap_interval(values, seed=0)
    return (high - low) / 2


def _best(cells: dict[tuple[float, float], Cell], value: Callable[[Cell], np.ndarray]) -> str:
    """The best cell, and its paired difference to temperature 1 everywhere."""
    (high, low), cell = max(cells.items(), key=lambda item: value(item[1]).mean())
    line = f"{value(cell).mean():.3f} at {high:g} and {low:g}"
    if (1.0, 1.0) not in cells:
        return line
    gain = value(cell) - value(cells[1.0, 1.0])
    below, above = bootstrap_interval(gain, seed=0)
    return f"{line}, {gain.mean():+.3f} [{below:+.3f}, {above:+.3f}] against 1 and 1"


def report(cells: dict[tuple[float, float], Cell], threshold: float, args: argparse.Namespace) -> str:
    """The tables as Markdown."""
    n = args.num_samples
    policy = "The warm start of LAW (seed 0)" if args.run is None else f"The newest checkpoint of {args.run.name}"
    width = max(_half_width(cell.reward) for cell in cells.values())
    pass_width = max(_half_width(cell.solved) for cell in cells.values())
    share = np.nanmean([cell.high_fraction for cell in cells.values()])
    return f"""# Temperature at high-entropy tokens against temperature elsewhere

{policy}, {args.num_prompts // BATCH * BATCH} held-out prompts x {n} samples per cell, with the same random numbers in
all cells. A token is of high entropy if the entropy of its distribution at temperature 1 is at least
{threshold:.3f} nats, the {args.quantile:g}-quantile over tokens sampled at temperature 1; over the cells this holds for
{share:.0%} of the tokens on average.

Command: `{args.command}`

Half-widths of 95 % bootstrap intervals over prompts are at most {width:.3f} (mean reward) and {pass_width:.3f}
(pass@{n}). Intervals of differences are paired by prompt; the best cell was chosen on the same prompts.

- Best mean reward: {_best(cells, lambda cell: cell.reward)}.
- Best pass@{n}: {_best(cells, lambda cell: cell.solved)}.

Mean reward:

{_grid(cells, lambda cell: float(cell.reward.mean()))}

pass@{n}:

{_grid(cells, lambda cell: float(cell.solved.mean()))}

Mean entropy of the distributions the tokens were drawn from, nats:

{_grid(cells, lambda cell: cell.entropy)}
"""


def main() -> None:
    """Parses the command line, measures the grid, prints its tables and writes them if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=None, help="folder of a run; default: the warm start of LAW")
    parser.add_argument("--write", type=Path, default=None, help="Markdown file for the tables")
    parser.add_argument("--num-prompts", type=int, default=512, help=f"held-out prompts, at least {BATCH}")
    parser.add_argument("--num-samples", type=int, default=8, help="responses per prompt")
    parser.add_argument("--quantile", type=float, default=0.8, help="of the entropies: the threshold")
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.25, 0.5, 0.75, 1.0, 1.25, 1.5])
    args = parser.parse_args()
    args.command = shlex.join(["python", *sys.argv])
    enable_compilation_cache()
    decoder = Decoder(args.run, args.num_prompts, args.num_samples)
    threshold, cells = measure(decoder, args.temperatures, args.quantile)
    text = report(cells, threshold, args)
    print(text)
    if args.write:
        args.write.parent.mkdir(parents=True, exist_ok=True)
        args.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
