"""The command line: parse, build the config, call."""

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from jentropy import config as config_lib
from jentropy.quickstart import quickstart
from jentropy.train.checkpoint import CheckpointError
from jentropy.train.loop import evaluate_run, train


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
    score = commands.add_parser("eval", help="evaluate the newest checkpoint of a run")
    score.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    score.add_argument(
        "--config", type=Path, metavar="CONFIG.py", help="the run's config, if it has functions of its own"
    )
    return parser


def _quickstart(args: argparse.Namespace) -> str:
    out = args.out or Path("runs") / time.strftime("quickstart-%Y%m%d-%H%M%S")
    text = quickstart(out)
    return f"\n{text}\n\nPicture: {out / 'quickstart.png'}\nRuns, metrics and this table: {out}"


def _train(args: argparse.Namespace) -> str:
    config = config_lib.apply_overrides(config_lib.load_config(args.config), args.overrides)
    out = args.out or Path("runs") / config.name
    final = train(config, out, resume=args.resume)
    return f"{json.dumps(final, indent=1)}\nPicture: {out / 'plot.png'}\nRun: {out}"


def _eval(args: argparse.Namespace) -> str:
    config = config_lib.load_config(args.config) if args.config else None
    return json.dumps(evaluate_run(args.run, config), indent=1)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0, or 2 for a bad config, folder or argument."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        print({"quickstart": _quickstart, "train": _train, "eval": _eval}[args.command](args))
    except (config_lib.ConfigError, CheckpointError, ValueError, OSError) as error:
        print(f"jentropy: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
