"""Every method against plain GRPO on the same warm starts and seeds, in the SHIFT and the LAW setting.

    python experiments/ablation.py --setting shift --tier 1 --out runs/ablation --write experiments/results/ablation.md
    python experiments/ablation.py --setting shift law --methods clip_cov siren --warm-starts 0 --seeds 0 1

A method is a config `experiments/configs/{shift,law}_<method>.py`; a new one is found by its name, and called what the
first line of its docstring says. Tier 1 are the entropy mechanisms, eight runs each; tier 2 is all the rest, two runs
each. GRPO is always there. Runs that have finished are kept: called again, it goes on where it stopped. A run of SHIFT
takes about 40 CPU-seconds, one of LAW 16, and two cores make two at a time; each method is compiled once, in half a
minute.
"""

import argparse
import ast
import functools
import itertools
import re
import shlex
import signal
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fiddle as fdl
from run_pool import Task, default_jobs, is_finished, make_runs, read_failure

from jentropy import config as config_lib
from jentropy.report.comparison import (
    Figure,
    Results,
    Row,
    chance,
    in_order,
    mean_rows,
    paired_rows,
    run_rows,
    sentence,
)
from jentropy.report.summary import law_row, shift_row
from jentropy.report.tables import table
from jentropy.train.metrics import read_metrics
from jentropy.train.signals import PreemptedError

CONFIGS = Path(__file__).resolve().parent / "configs"
BASELINE, BASELINE_TITLE = "grpo", "GRPO"
ENTROPY_MECHANISMS = (
    *("clip_higher", "top_entropy", "clip_cov", "kl_cov", "entropy_bonus", "adaptive_entropy", "entropy_band"),
    *("siren", "entropy_advantage", "semantic_entropy", "entropy_temperature", "e3_temperature", "qae", "steer"),
    "ce_gppo",
)
"""Methods of tier 1, as far as they have a config."""
INSTRUMENTS = ("ledger",)
"""Configs that are no methods: they look at plain GRPO."""
TIERS = {1: "entropy mechanisms", 2: "estimators, losses, sampling and the rest"}
SEEDS = {1: [0, 1, 2, 3], 2: [0]}
"""Of reinforcement learning on each warm start, by tier."""


class Setting(NamedTuple):
    """What is measured in a setting, and how it is called.

    Attributes:
      about: what happens in it, with the steps of its stages to be filled in.
      figures: of every run.
      main: key of the one by which methods are sorted and wins are counted.
      main_heading: of the column of wins.
      steps_heading: of the steps to the goal.
      each: further figures of single runs, key -> heading and format.
      row: the figures of a run, from its metrics and its config.
    """

    about: str
    figures: tuple[Figure, ...]
    main: str
    main_heading: str
    steps_heading: str
    each: Mapping[str, tuple[str, str]]
    row: Callable[[Sequence[Mapping[str, Any]], fdl.Config], Row]


def _shift_row(lines: Sequence[Mapping[str, Any]], config: fdl.Config) -> Row:
    shift_step = sum(stage.steps for stage in config.stages[1:-1])
    return shift_row(lines, shift_step, num_samples=config.evaluation.num_samples)


def _law_row(lines: Sequence[Mapping[str, Any]], config: fdl.Config) -> Row:
    return law_row(lines, num_samples=config.evaluation.num_samples)


_FINAL = (
    Figure("final_reward", "final reward"),
    Figure("hard_reward", "reward, n >= 4"),
    Figure("pass_at_n", "pass@8"),
    Figure("greedy_reward", "greedy accuracy"),
    Figure("entropy_after", "final entropy", good=False),
)
SETTINGS = {
    "shift": Setting(
        about="{} rollouts on two-digit prompts, where a shortcut is enough, then {} on a mixture where chains are "
        "needed. Entropy before the shift is that of the training prompts of the last 10 rollouts before it.",
        figures=(
            Figure("entropy_before", "entropy before the shift", good=False),
            Figure("mean_after", "mean reward after the shift"),
            *_FINAL,
        ),
        main="mean_after",
        main_heading="higher mean reward after",
        steps_heading="steps to reward .9 after the shift",
        each={"final_reward": ("final reward", ".2f")},
        row=_shift_row,
    ),
    "law": Setting(
        about="{} rollouts from a warm start in which both strategies are likely: there is nothing to explore, and "
        "plain GRPO buys reward with entropy along R = -a exp(H) + b. The ceiling is b - a of the fit to a run's "
        "evaluations, mean entropy that of the training prompts of all rollouts.",
        figures=(
            Figure("mean_entropy", "mean entropy of the run", good=False),
            Figure("mean_reward", "mean reward of the run"),
            *_FINAL,
        ),
        main="final_reward",
        main_heading="higher final reward",
        steps_heading="steps to reward .9",
        each={
            "final_reward": ("final reward", ".2f"),
            "ceiling": ("ceiling b - a", ".2f"),
            "r_squared": ("R² of the law", ".2f"),
        },
        row=_law_row,
    ),
}


def methods_of(setting: str) -> dict[str, Path]:
    """The configs of a setting by method, GRPO first."""
    found = {path.stem.removeprefix(f"{setting}_"): path for path in sorted(CONFIGS.glob(f"{setting}_*.py"))}
    return {BASELINE: found[BASELINE]} | {method: path for method, path in found.items() if method not in INSTRUMENTS}


def methods_of_tier(setting: str, tier: int) -> list[str]:
    """GRPO and the methods of a tier that have a config."""
    found = methods_of(setting)
    others = [method for method in found if method not in (BASELINE, *ENTROPY_MECHANISMS)]
    return [BASELINE, *([method for method in ENTROPY_MECHANISMS if method in found] if tier == 1 else others)]


def first_line(path: Path) -> str:
    """Of the docstring of a config file."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def title(setting: str, method: str) -> str:
    """What the first line of the config says the setting is used with."""
    if method == BASELINE:
        return BASELINE_TITLE
    match = re.match(r"\w+ with (?:an? |the )?(.+?): ", first_line(methods_of(setting)[method]))
    return match[1] if match else method.replace("_", " ")


def world(config: fdl.Config) -> list[str]:
    """Those lines of a flattened config that must be equal for figures to compare: what all methods act in."""
    pattern = re.compile(r"(task|policy|evaluation|stages\.0|stages\.\d+\.(steps|mixture))\b")
    return [line for line in config_lib.flatten(config) if pattern.match(line)]


def smoke(config: fdl.Config) -> fdl.Config:
    """Makes an experiment as small as it can be, in place; its figures mean nothing."""
    config.policy.width, config.policy.num_layers, config.policy.mlp_width = 16, 1, 16
    config.policy.num_heads, config.policy.num_kv_heads, config.policy.head_size = 2, 1, 8
    warm_start = config.stages[0]
    warm_start.steps = warm_start.optimizer.decay_steps = 4
    warm_start.batch_size, warm_start.optimizer.warmup_steps = 16, 1
    for stage in config.stages[1:]:
        stage.steps, stage.num_prompts, stage.num_generations = 4, 4, 4
    evaluation = config.evaluation
    evaluation.every, evaluation.num_prompts, evaluation.final_num_prompts = 2, 8, 16
    config.checkpoint_every, config.eval_batch = 3, 8
    return config


def make_task(config: fdl.Config, name: str, program: str, pair: tuple[int, int], args: argparse.Namespace) -> Task:
    """The run of a config on a warm start and a seed; the config is changed in place."""
    warm, seed = pair
    config.name, config.stages[0].seed, config.seed = f"{name}-w{warm}-s{seed}", warm, seed
    return Task(smoke(config) if args.smoke else config, args.out / config.name, program, args.allow_change)


class Study(NamedTuple):
    """Methods that are compared with one another in one setting.

    Attributes:
      heading: of its section.
      setting: key of `SETTINGS`.
      tasks: runs by the method's title and pair of warm start and seed.
      notes: Markdown after the tables.
      is_sorted: whether methods are in the order of their success, else in that of `tasks`.
      is_stacked: whether each method is the one above it and something more, so that the two are compared as well.
    """

    heading: str
    setting: str
    tasks: Mapping[str, Mapping[tuple[int, int], Task]]
    notes: str = ""
    is_sorted: bool = True
    is_stacked: bool = False


def pairs_of(warm_starts: Iterable[int], seeds: Sequence[int]) -> list[tuple[int, int]]:
    """All pairs of a warm start and a seed."""
    return [(warm, seed) for warm in warm_starts for seed in seeds]


def study(setting: str, tier: int, args: argparse.Namespace) -> Study:
    """The runs of one section: the methods that were asked for, or those of the tier."""
    paths = methods_of(setting)
    methods = list(dict.fromkeys([BASELINE, *(args.methods or methods_of_tier(setting, tier))]))
    tasks, legend, apart = {}, [], []
    for method in methods:
        name, called = f"{setting}_{method}", title(setting, method)
        called = f"{called} ({method})" if called in tasks else called
        load = functools.partial(config_lib.load_config, paths[method])
        if world(load()) != world(config_lib.load_config(paths[BASELINE])):
            apart.append(f"`{name}.py`")
            continue
        pairs = pairs_of(args.warm_starts or [0, 1], args.seeds or SEEDS[tier])
        tasks[called] = {pair: make_task(load(), name, name, pair, args) for pair in pairs}
        legend.append({"method": called, "config": f"`{name}.py`", "what": first_line(paths[method])})
    columns = {"method": "method", "config": "experiments/configs/", "what": "its first line"}
    what = "methods that were asked for" if args.methods else TIERS[tier]
    notes = [table(legend, columns)]
    notes += [f"Not here, as their task, warm start or evaluation is another one: {', '.join(apart)}."] if apart else []
    return Study(f"{setting.upper()}: {what}", setting, tasks, "\n\n".join(notes))


def results_of(study: Study) -> dict[str, dict[tuple[int, int], Row | None]]:
    """The figures of all runs; None where there are none."""
    row = SETTINGS[study.setting].row

    def figures(task: Task) -> Row | None:
        return row(read_metrics(task.out / "metrics.jsonl"), task.config) if is_finished(task.out) else None

    return {method: {pair: figures(task) for pair, task in runs.items()} for method, runs in study.tasks.items()}


def failures(study: Study) -> list[str]:
    """A line of Markdown for every run without figures."""
    tasks = [task for runs in study.tasks.values() for task in runs.values() if not is_finished(task.out)]
    return [f"- `{task.config.name}`: {read_failure(task.out) or 'not made, or not finished'}" for task in tasks]


def _about(study: Study) -> str:
    """What was run, in words."""
    config = next(iter(next(iter(study.tasks.values())).values())).config
    evaluation, warm_starts = config.evaluation, {pair[0] for runs in study.tasks.values() for pair in runs}
    seeds = sorted({pair[1] for runs in study.tasks.values() for pair in runs})
    text = SETTINGS[study.setting].about.format(*(stage.steps for stage in config.stages[1:]))
    text = (
        f"{text} Warm starts {sorted(warm_starts)}, seeds {seeds} of reinforcement learning on each. Entropies are in "
        "nats per token: of training at the temperature of sampling, which is 1 except for methods that steer it, of "
        f"held-out prompts at temperature 1. Rewards along the way: {evaluation.num_prompts} held-out prompts x "
        f"{evaluation.num_samples} samples every {evaluation.every} rollouts; final figures: "
        f"{evaluation.final_num_prompts} prompts x {evaluation.num_samples} samples, and one greedy response each."
    )
    return textwrap.fill(text, 120)


def said(results: Results, setting: Setting, figures: Sequence[Figure]) -> str:
    """What the paired intervals say, in sentences that are made of them; empty if there is nothing to compare."""
    if len(results) < 2:
        return ""
    lines = [f"- {sentence(results, BASELINE_TITLE, figure)}" for figure in figures]
    return "\n".join([textwrap.fill(chance(results, BASELINE_TITLE, len(figures)), 120), "", *lines])


def section(study: Study) -> str:
    """The Markdown of a study: what the intervals say, the tables, what failed."""
    setting, found = SETTINGS[study.setting], results_of(study)
    rows = [row for runs in found.values() for row in runs.values() if row is not None]
    figures = [figure for figure in setting.figures if all(row[figure.key] is not None for row in rows)]
    results = in_order(found, BASELINE_TITLE, setting.main) if study.is_sorted else found
    headings = {figure.key: figure.heading for figure in figures}
    means = {"method": "method", "runs": "runs", "half": f"half of the runs: {setting.steps_heading}"} | headings
    paired = {"method": "method", "wins": setting.main_heading, "sooner": "sooner : later at .9"} | headings
    each = {"method": "method", "steps": setting.steps_heading}
    each |= {key: heading for key, (heading, _) in setting.each.items()}
    parts = [f"## {study.heading}", _about(study)]
    parts += [said(results, setting, figures), "Means over runs with 95 % bootstrap intervals over runs:"]
    parts += [table(mean_rows(results, figures), means)]
    differences = paired_rows(results, BASELINE_TITLE, figures, setting.main)
    if differences:
        parts += [f"Paired differences to {BASELINE_TITLE} on the same warm start and seed:"]
        parts += [table(differences, paired)]
    if study.is_stacked:
        steps = [{above: results[above], method: results[method]} for above, method in itertools.pairwise(results)]
        rows = [row for two in steps for row in paired_rows(two, next(iter(two)), figures, setting.main)]
        parts += ["Paired differences of each row to the one above it:", table(rows, paired)]
    parts += ["Each run, in the order of warm starts and then seeds:"]
    parts += [table(run_rows(results, {key: form for key, (_, form) in setting.each.items()}), each)]
    if failures(study):
        parts += ["Runs without figures. They count as never and as no win, and are in no mean:"]
        parts += ["\n".join(failures(study))]
    return "\n\n".join(part for part in (*parts, study.notes) if part)


def document(heading: str, about: str, studies: Iterable[Study], command: str) -> str:
    """The Markdown file."""
    head = [f"# {heading}", textwrap.fill(about.strip(), 120), f"Command: `{command}`"]
    return "\n\n".join([*head, *(section(each) for each in studies)]) + "\n"


ABOUT = """
Every method takes the place of plain GRPO, or is added to it, in one experiment (`jentropy/embedded.py`). Runs of one
warm start and seed begin with the same parameters and are compared in pairs. A method is better or worse in a figure
(of entropies: higher or lower) if the 95 % bootstrap interval of its paired differences excludes 0. The runs share few
warm starts, so the intervals are narrower than those over new warm starts would be, and bootstrap intervals over few
runs are too narrow by themselves. All of it holds for a policy of 99,648 parameters, 16 tokens and responses of at most
7 tokens, with settings rescaled for it, and says little about larger ones.
"""


def parser(doc: str, out: str, warm_starts: str = "0 1") -> argparse.ArgumentParser:
    """The arguments that the scripts share; `warm_starts` are the default ones, in words."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--out", type=Path, default=Path(out), help=f"folder of the runs (default: {out})")
    found.add_argument("--write", type=Path, default=None, help="Markdown file for the tables")
    found.add_argument("--warm-starts", nargs="+", type=int, default=None, help=f"their seeds (default: {warm_starts})")
    found.add_argument("--seeds", nargs="+", type=int, default=None, help="seeds of reinforcement learning on each")
    found.add_argument("--jobs", type=int, default=None, help="processes (default: one per core)")
    found.add_argument("--no-run", action="store_true", help="make no run: tables of what is there")
    found.add_argument("--allow-change", action="store_true", help="keep and resume runs made with another config")
    found.add_argument("--smoke", action="store_true", help="a tiny model and a few steps, to see that it works")
    return found


def finish(args: argparse.Namespace, studies: Sequence[Study], heading: str, about: str) -> int:
    """Makes the runs of the studies and writes their document; see `run_and_write`."""
    tasks = {task.out: task for each in studies for runs in each.tasks.values() for task in runs.values()}
    return run_and_write(args, list(tasks.values()), lambda command: document(heading, about, studies, command))


def run_and_write(args: argparse.Namespace, tasks: Sequence[Task], written: Callable[[str], str]) -> int:
    """Makes the runs, prints what is `written` of them, given the command, and keeps it if asked.

    Returns:
      The exit code: 0 done, 1 a run failed that may not fail again, 2 a bad argument, config or folder, 75 stopped by a
      signal.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if not args.no_run:
            make_runs(tasks, args.jobs or default_jobs())
    except config_lib.ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except (KeyboardInterrupt, PreemptedError):
        print("stopped; the same command goes on", file=sys.stderr)
        return PreemptedError.exit_code
    finally:
        signal.signal(signal.SIGTERM, before)
    text = written(shlex.join(["python", *sys.argv]))
    print(text)
    if args.write:
        args.write.parent.mkdir(parents=True, exist_ok=True)
        args.write.write_text(text, encoding="utf-8")
    failed = [read_failure(task.out) for task in tasks if not is_finished(task.out)]
    return int(not args.no_run and any(failure is None or not failure.lasting for failure in failed))


def main() -> int:
    """Parses the command line and runs the ablation."""
    options = parser(__doc__ or "", "runs/ablation")
    options.add_argument("--setting", nargs="+", choices=SETTINGS, default=["shift"])
    options.add_argument("--tier", nargs="+", type=int, choices=TIERS, default=[1])
    options.add_argument("--methods", nargs="+", default=None, help="instead of those of the tier; GRPO is added")
    args = options.parse_args()
    for setting in args.setting:
        unknown = sorted(set(args.methods or ()) - set(methods_of(setting)))
        if unknown:
            known = ", ".join(methods_of(setting))
            options.error(f"no config {setting}_{unknown[0]}.py in experiments/configs; methods there: {known}")
    tiers = args.tier[:1] if args.methods else args.tier
    studies = [study(setting, tier, args) for setting in args.setting for tier in tiers]
    return finish(args, studies, "Ablation: methods on the same warm starts", ABOUT)


if __name__ == "__main__":
    sys.exit(main())
