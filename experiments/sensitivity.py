"""How much the settings of the methods matter: small sweeps of the papers' advice, and three methods stacked.

    python experiments/sensitivity.py --out runs/ablation --write experiments/results/sensitivity.md

Each sweep takes a config `experiments/configs/shift_<method>.py` and changes numbers of its method, in the SHIFT
setting, two seeds on each of two warm starts. The numbers are arrays in the training state, so a sweep is compiled
once. In the folder of an ablation plain GRPO is taken from there.
"""

import argparse
import copy
import functools
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import fiddle as fdl
from ablation import BASELINE, BASELINE_TITLE, Study, finish, make_task, methods_of, pairs_of, parser
from run_pool import Task

from jentropy import config as config_lib

Pair: TypeAlias = tuple[int, int]
"""A warm start and a seed."""


class Sweep(NamedTuple):
    """Values of the numbers of one method.

    Attributes:
      what: heading of the section.
      config: whose numbers these are: `shift_<config>.py`.
      part: where they are, in `objective`.
      grid: values by the number's name; all combinations are run.
    """

    what: str
    config: str
    part: str
    grid: Mapping[str, Sequence[float]]


SWEEPS = {
    "top_rho": Sweep(
        "Top-entropy: the fraction ρ of tokens that keep their gradient", "top_entropy", "mechanisms.top_entropy",
        {"top_entropy_quantile": (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)},
    ),
    "entropy_advantage": Sweep(
        "Entropy advantage: scale α and divisor κ", "entropy_advantage", "mechanisms.entropy_advantage",
        {"entropy_adv_alpha": (0.1, 0.4, 1.0), "entropy_adv_kappa": (1.0, 2.0, 4.0)},
    ),
    "clip_higher": Sweep(
        "Clip-higher: the upper bound of the ratio", "clip_higher", "mechanisms.clip_range",
        {"epsilon_high": (0.28, 0.5, 1.0, 3.0)},
    ),
    "qae": Sweep("QAE: the quantile K", "qae", "estimator", {"quantile_k": (0.2, 0.4, 0.6, 0.8)}),
    "kl_cov": Sweep(
        "KL-Cov: fraction of tokens and coefficient β", "kl_cov", "mechanisms.kl_cov",
        {"kl_cov_ratio": (0.02, 0.1, 0.3), "ppo_kl_coef": (0.3, 1.0, 3.0)},
    ),
}  # fmt: skip
STACK = (
    ("clip-higher", "clip_higher", "clip_range"),
    ("+ top-ρ", "top_entropy", "top_entropy"),
    ("+ entropy advantage", "entropy_advantage", "entropy_advantage"),
)
"""Title, config `shift_<method>.py` and name in its chain of what is stacked, in this order."""
STACKED = "stack"


def _load(method: str) -> fdl.Config:
    return config_lib.load_config(methods_of("shift")[method])


def _changed(sweep: Sweep, values: Mapping[str, float]) -> fdl.Config:
    """The config of the sweep's method with other numbers, in all stages."""
    config = _load(sweep.config)
    places = [f"stages.{i}.objective.{sweep.part}" for i in range(1, len(config.stages))]
    return config_lib.apply_overrides(
        config, [f"{place}.{name}={x!r}" for place in places for name, x in values.items()]
    )


def stacked(number: int) -> fdl.Config:
    """Plain GRPO with the first `number` methods of the stack."""
    config = _load(BASELINE)
    for _, method, name in STACK[:number]:
        for stage, other in zip(config.stages[1:], _load(method).stages[1:], strict=True):
            setattr(stage.objective.mechanisms, name, copy.deepcopy(getattr(other.objective.mechanisms, name)))
    return config


def _runs(make: Callable[[], fdl.Config], name: str, program: str, args: argparse.Namespace) -> Mapping[Pair, Task]:
    pairs = pairs_of(args.warm_starts or [0, 1], args.seeds or [0, 1])
    return {pair: make_task(make(), name, program, pair, args) for pair in pairs}


def _baseline(args: argparse.Namespace) -> dict[str, Mapping[Pair, Task]]:
    name = f"shift_{BASELINE}"
    return {BASELINE_TITLE: _runs(functools.partial(_load, BASELINE), name, name, args)}


def sweep_study(name: str, args: argparse.Namespace) -> Study:
    """The runs of a sweep, and those of plain GRPO."""
    sweep, tasks = SWEEPS[name], _baseline(args)
    for values in itertools.product(*sweep.grid.values()):
        chosen = dict(zip(sweep.grid, values, strict=True))
        title = ", ".join(f"{number} {value:g}" for number, value in chosen.items())
        run = "_".join([f"shift_{name}", *(f"{value:g}" for value in values)])
        tasks[title] = _runs(functools.partial(_changed, sweep, chosen), run, f"sweep {name}", args)
    config = f"`experiments/configs/shift_{sweep.config}.py`"
    return Study(sweep.what, "shift", tasks, f"All other settings are those of {config}.", is_sorted=False)


def stack_study(args: argparse.Namespace) -> Study:
    """The runs of the stack, each with one method more than the one before."""
    tasks, above = _baseline(args), BASELINE_TITLE
    for number, (title, _, _) in enumerate(STACK, start=1):
        above = title if number == 1 else f"{above} {title}"
        run = f"shift_{STACKED}_{number}"
        tasks[above] = _runs(functools.partial(stacked, number), run, run, args)
    configs = ", ".join(f"`shift_{method}.py`" for _, method, _ in STACK)
    notes = f"The settings are those of {configs} in `experiments/configs/`."
    return Study("Three methods stacked", "shift", tasks, notes, is_sorted=False, is_stacked=True)


ABOUT = """
Numbers of single methods changed in the SHIFT setting (`jentropy/embedded.py`), and methods added to one another. Each
is compared with plain GRPO on the same warm starts and seeds. Few runs stand behind a row: what can be read here are
tendencies along a sweep. The policy has 99,648 parameters and 16 tokens, its responses at most 7: the values that are
best here need not be best elsewhere.
"""


def main() -> int:
    """Parses the command line, runs the sweeps and the stack."""
    options = parser(__doc__ or "", "runs/ablation")
    names = [*SWEEPS, STACKED]
    options.add_argument("--sweeps", nargs="+", choices=names, default=names)
    args = options.parse_args()
    needed = {SWEEPS[name].config for name in args.sweeps if name in SWEEPS}
    needed |= {method for _, method, _ in STACK} if STACKED in args.sweeps else set()
    for method in sorted(needed - set(methods_of("shift"))):
        options.error(f"there is no config shift_{method}.py in experiments/configs")
    studies = [stack_study(args) if name == STACKED else sweep_study(name, args) for name in args.sweeps]
    return finish(args, studies, "Sensitivity: numbers of the methods, and methods stacked", ABOUT)


if __name__ == "__main__":
    sys.exit(main())
