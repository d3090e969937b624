"""The whole fault matrix, written down.

Command: python experiments/faults/matrix.py --write experiments/results/faults.md

Runs the scripts of this folder one after the other and writes the tables that they print, each with its command and
the docstring that says what a failure is. Half an hour on two cores. Returns 1 if any trial failed.
"""

import argparse
import ast
import re
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
COMMANDS = {
    "checkpoints.py": ["--trials", "200", "--kills", "5", "--random-kills", "50"],
    "graders.py": [],
    "runs.py": ["--scale", "1"],
}


def section(name: str, options: list[str]) -> tuple[str, int]:
    """The Markdown of one script, and its exit code."""
    began = time.monotonic()
    command = [sys.executable, str(HERE / name), *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    what = ast.get_docstring(ast.parse((HERE / name).read_text(encoding="utf-8"))) or ""
    shown = " ".join(["python", f"experiments/faults/{name}", *options])
    minutes = (time.monotonic() - began) / 60
    text = re.sub(r"\nCommand: .*\n", "", what)
    return f"## {shown}\n\n{text}\n\n{done.stdout.strip()}\n\n({minutes:.0f} minutes)\n", done.returncode


def main() -> int:
    """Runs all of it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", type=Path, required=True, help="Markdown file to write")
    args = parser.parse_args()
    sections = [section(name, options) for name, options in COMMANDS.items()]
    failed = sum(code != 0 for _, code in sections)
    head = (
        "# Faults\n\nWhat was done to jentropy on purpose, how often, and how often it failed. Two CPU cores, Linux; "
        f"one process per trial where a process is killed.\n\nCommand: `python experiments/faults/matrix.py --write "
        f"{args.write.as_posix()}`; seed 0. A trial fails as each section says.\n"
    )
    args.write.write_text("\n".join([head, *(text for text, _ in sections)]), encoding="utf-8")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
