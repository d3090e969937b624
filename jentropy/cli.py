"""The command line: parse, build the config, call."""

import argparse
import errno
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import fiddle as fdl

from jentropy import config as config_lib
from jentropy.data.jsonl import CorruptDataError
from jentropy.quickstart import quickstart
from jentropy.report.fit import write_fit
from jentropy.report.report import report
from jentropy.train.checkpoint import CheckpointError
from jentropy.train.doctor import doctor
from jentropy.train.kept import KeptError
from jentropy.train.lock import LockedError
from jentropy.train.loop import enable_compilation_cache, evaluate_run, train
from jentropy.train.preflight import run_folder
from jentropy.train.quarantine import NumericError, QuarantineError
from jentropy.train.replay import replay_kept
from jentropy.train.signals import PreemptedError
from jentropy.train.what_if import what_if


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jentropy", description="Policy entropy in RL with verifiable rewards.")
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser("quickstart", help="collapse, the law and a shift of the task, in minutes")
    start.add_argument("--out", type=Path, default=None, help="folder (default: runs/quickstart-<time>)")
    run = commands.add_parser("train", help="run an experiment config")
    run.add_argument("config", type=Path, metavar="CONFIG.py", help="a file that defines get_config()")
    run.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="path.to.field=value",
        help="change a field of the config; may be given several times",
    )  # fmt: skip
    run.add_argument("--out", type=Path, default=None, help="folder of the run (default: runs/<name>)")
    run.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the folder")
    run.add_argument(
        "--strict", action="store_true", help="resume from the newest checkpoint or, if damaged, not at all"
    )
    run.add_argument("--allow-change", action="store_true", help="resume with changes of the config that need it")
    score = commands.add_parser("eval", help="evaluate the newest checkpoint of a run")
    score.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    score.add_argument(
        "--config", type=Path, metavar="CONFIG.py", help="the run's config, if it has functions of its own"
    )
    check = commands.add_parser("doctor", help="verify a run, replay a skipped batch, compare two runs")
    check.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    check.add_argument("other", type=Path, nargs="?", metavar="OTHER", help="a run to compare it with, line by line")
    check.add_argument("--replay", action="store_true", help="replay the newest quarantined batch")
    check.add_argument("--step", type=int, default=None, help="replay the quarantined batch of this step")
    check.add_argument("--config", type=Path, metavar="CONFIG.py", help="its config, if it has functions of its own")
    again = commands.add_parser("replay", help="do the updates of a kept step again, as they were or by another method")
    again.add_argument("run", type=Path, metavar="RUN", help="folder of a run with keep_rollouts")
    again.add_argument("--step", type=int, required=True, help="number of a kept rollout")
    again.add_argument(
        "--config", type=Path, metavar="CONFIG.py",
        help="use the method of this config (or the run's own config, if it has functions of its own)",
    )  # fmt: skip
    other = commands.add_parser("what-if", help="what the methods of some configs would do with a kept rollout")
    other.add_argument("run", type=Path, metavar="RUN", help="folder of a run with keep_rollouts")
    other.add_argument("--step", type=int, required=True, help="number of a kept rollout")
    other.add_argument(
        "--config", dest="configs", type=Path, nargs="+", action="extend", default=[], metavar="CONFIG.py",
        help="compare the methods of these configs with the run's own and plain GRPO",
    )  # fmt: skip
    other.add_argument("--measure", action="store_true", help="make each method's real updates and measure the change")
    other.add_argument("--updates", type=int, metavar="M", help="with --measure: real updates (default: the config's)")
    other.add_argument("--out", type=Path, metavar="FILE.json", help="write the findings there as well")
    _add_fit(commands)
    _add_report(commands)
    return parser


def _add_fit(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    law = commands.add_parser(
        "fit", help="fit the law R = -a exp(H) + b to the evaluations of runs",
        description="Fits reward against entropy for every stage of every run: a, b and the ceiling b - a with errors "
        "and intervals, how well the beginning forecasts the rest, and entropy spent for reward gained. Runs of one "
        "stage, policy and data are fitted together as well. Writes law.json and law.png.",
    )  # fmt: skip
    law.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, finished or not")
    law.add_argument(
        "--until", type=int, default=None, metavar="STEP",
        help="fit only evaluations up to this step, and see how well they predict the later ones",
    )  # fmt: skip
    law.add_argument(
        "--out", type=Path, default=None, metavar="FOLDER", help="of the files (default: RUN, for several runs/fit)"
    )


def _add_report(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    page = commands.add_parser(
        "report", help="write one HTML page about runs",
        description="Writes one page that needs no network: final figures, curves with bands over seeds, the law with "
        "its forecast, the entropy ledger, configs and their differences, and responses token by token. Runs that "
        "differ only in seeds and name are one method.",
    )  # fmt: skip
    page.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, finished or not")
    page.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE.html", help="default: %(default)s")
    page.add_argument(
        "--responses", type=int, default=16, metavar="N", help="responses in the token atlas, in all (default: 16)"
    )


def _config_at(path: Path | None) -> fdl.Config | None:
    return config_lib.load_config(path) if path else None


def _quickstart(args: argparse.Namespace) -> int:
    out = args.out or Path("runs") / time.strftime("quickstart-%Y%m%d-%H%M%S")
    text = quickstart(out)
    print(f"\n{text}\n\nPicture: {out / 'quickstart.png'}\nRuns, metrics and this table: {out}")
    return 0


def _train(args: argparse.Namespace) -> int:
    config = config_lib.apply_overrides(config_lib.load_config(args.config), args.overrides)
    out = args.out or run_folder(Path("runs"), config.name)
    final = train(config, out, resume=args.resume, strict=args.strict, allow_change=args.allow_change)
    print(f"{json.dumps(final, indent=1)}\nPicture: {out / 'plot.png'}\nRun: {out}")
    return 0


def _eval(args: argparse.Namespace) -> int:
    print(json.dumps(evaluate_run(args.run, _config_at(args.config)), indent=1))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    report = doctor(
        args.run, replay_step=args.step, replay_newest=args.replay, other=args.other, config=_config_at(args.config)
    )
    print(report.text())
    return report.exit_code


def _replay(args: argparse.Namespace) -> int:
    enable_compilation_cache()
    found = replay_kept(args.run, args.step, _config_at(args.config))
    print(found.text())
    return found.exit_code


def _what_if(args: argparse.Namespace) -> int:
    if args.updates is not None and not args.measure:
        raise ValueError("--updates is for --measure: without it no update is made")
    enable_compilation_cache()
    configs = [config_lib.load_config(path) for path in args.configs]
    found = what_if(args.run, args.step, configs, measure=args.measure, updates=args.updates)
    print(found.text())
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found.to_json(), indent=1) + "\n", encoding="utf-8")
        print(f"Findings: {args.out}")
    return 0


def _fit(args: argparse.Namespace) -> int:
    print(write_fit(args.runs, args.out, args.until))
    return 0


def _report(args: argparse.Namespace) -> int:
    enable_compilation_cache()
    report(args.runs, args.out, num_responses=args.responses)
    print(f"Report: {args.out}")
    return 0


_COMMANDS = {
    "quickstart": _quickstart, "train": _train, "eval": _eval, "doctor": _doctor, "replay": _replay,
    "fit": _fit,
    "what-if": _what_if,
    "report": _report,
}  # fmt: skip
_WITH_CODE = (
    *(CheckpointError, CorruptDataError, KeptError, LockedError),
    *(NumericError, PreemptedError, QuarantineError),
)
_FULL_OR_BROKEN = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code.

    0 done, 2 bad config, folder or argument, 65 damaged files, 70 numbers that are not finite, 73 another process runs
    in the folder, 74 a full or failing disk, 75 stopped by a signal with its checkpoint committed, 77 (from the
    watchdog) a hang.
    """
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        return _COMMANDS[args.command](args)
    except _WITH_CODE as error:
        print(f"jentropy: {error}", file=sys.stderr)
        return error.exit_code
    except (config_lib.ConfigError, ValueError, OSError, ImportError) as error:
        print(f"jentropy: {error}", file=sys.stderr)
        return 74 if isinstance(error, OSError) and error.errno in _FULL_OR_BROKEN else 2


if __name__ == "__main__":
    sys.exit(main())
