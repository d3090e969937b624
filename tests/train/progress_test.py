"""The progress bar, and the lines that stand for it where there is no terminal."""

import io

import pytest

from jentropy.train.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(file, **kwargs):
    with Progress(25, initial=5, file=file, **kwargs) as bar:
        for step in range(6, 26):
            bar.update(step, reward=step / 100, entropy=0.5)
    return file.getvalue()


def test_a_terminal_gets_a_bar():
    text = run(Terminal()).split("\r")[-1]
    assert "25/25" in text and "reward 0.250 entropy 0.500" in text


def test_elsewhere_it_is_silent_and_quiet_is_silent_everywhere():
    assert run(io.StringIO()) == ""
    assert run(Terminal(), quiet=True) == ""
    assert run(io.StringIO(), force=True, quiet=True) == ""


def test_notes_go_where_the_steps_go():
    for file, kwargs, expected in (
        (Terminal(), {}, True),
        (Terminal(), {"quiet": True}, False),
        (io.StringIO(), {}, False),
        (io.StringIO(), {"force": True}, True),
    ):
        with Progress(3, file=file, **kwargs) as bar:
            bar.note("warm start done")
        assert ("warm start done\n" in file.getvalue()) == expected


def test_forced_it_prints_a_line_every_few_steps():
    lines = run(io.StringIO(), force=True, every=10).splitlines()
    assert [line.split(" left ")[0] for line in lines] == [
        "step 10/25 reward 0.100 entropy 0.500",
        "step 20/25 reward 0.200 entropy 0.500",
        "step 25/25 reward 0.250 entropy 0.500",
    ]
    assert lines[-1].endswith("left 00:00")
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        Progress(3, every=0)
