"""What a person sees while a run goes on: a bar, or lines where there is no terminal."""

import sys
import time
from types import TracebackType
from typing import TextIO

from tqdm import tqdm


class Progress:
    """Steps done, reward, entropy and time left; a context manager.

    On a terminal it is a bar. Elsewhere it is silent or, if forced, prints a line every so many steps.

    Args:
      total: steps of the whole run.
      initial: steps already done, for a resumed run.
      quiet: write nothing anywhere.
      force: whether to print lines where there is no terminal.
      every: steps between two such lines, >= 1; the last step always has one.
      file: where to write, standard error by default.
    """

    def __init__(
        self,
        total: int,
        *,
        initial: int = 0,
        quiet: bool = False,
        force: bool = False,
        every: int = 10,
        file: TextIO | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every!r}")
        self._file = sys.stderr if file is None else file
        self._bar: tqdm | None = None
        if self._file.isatty() and not quiet:
            self._bar = tqdm(total=total, initial=initial, file=self._file, dynamic_ncols=True, unit="step")
        self._lines = force and not quiet and self._bar is None
        self._total, self._initial, self._every = total, initial, every
        self._start = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def update(self, step: int, *, reward: float, entropy: float) -> None:
        """Shows that `step` steps are done; reward and entropy (nats) are those of the last one."""
        shown = f"reward {reward:.3f} entropy {entropy:.3f}"
        if self._bar is not None:
            self._bar.set_postfix_str(shown, refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._lines and (step % self._every == 0 or step == self._total):
            seconds = (time.monotonic() - self._start) / max(step - self._initial, 1) * (self._total - step)
            left = tqdm.format_interval(seconds)
            print(f"step {step}/{self._total} {shown} left {left}", file=self._file, flush=True)

    def note(self, text: str) -> None:
        """Writes a line of its own, above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._file)
        elif self._lines:
            print(text, file=self._file, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
