"""What the benchmarks share: CPU time of calls that take turns, and the command line.

Time is that of all threads of the process (`time.process_time`), so that other processes matter little; still, use an
idle machine.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import jax

from jentropy.train.allocator import keep_freed_memory
from jentropy.train.loop import enable_compilation_cache

Call: TypeAlias = Callable[[], Any]


def medians(calls: Mapping[str, Call], repeats: int, blocks: int) -> dict[str, float]:
    """CPU-seconds of one call of each: the median over blocks in which they take turns, after one call to warm up."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    for _ in range(blocks):
        for name, call in calls.items():
            start = time.process_time()
            for _ in range(repeats):
                jax.block_until_ready(call())
            found[name].append((time.process_time() - start) / repeats)
    return {name: statistics.median(times) for name, times in found.items()}


def machine() -> str:
    """What the figures were measured on, in words."""
    load = os.getloadavg()[0]
    return f"{platform.machine()}, {os.cpu_count()} CPUs, load average {load:.1f}, JAX {jax.__version__}, float32."


def run(doc: str | None, measure: Callable[[int, int], str], *, repeats: int, blocks: int) -> None:
    """The program of a benchmark: parses the command line, measures, prints and, if asked, writes.

    Args:
      doc: of its module.
      measure: (calls per block, blocks) -> Markdown.
      repeats: default number of calls per block.
      blocks: default number of blocks.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=repeats, help="calls per block (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=blocks, help="blocks (default: %(default)s)")
    parser.add_argument("--write", type=Path, default=None, help="Markdown file for the table")
    args = parser.parse_args()
    for name in ("repeats", "blocks"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    enable_compilation_cache()
    keep_freed_memory()
    text = measure(args.repeats, args.blocks)
    print(text)
    if args.write:
        args.write.write_text(text, encoding="utf-8")
