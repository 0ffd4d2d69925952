"""Long loops say how long they still take, on a terminal only."""

import io
from types import SimpleNamespace

import pytest

from quotientopt import _system
from quotientopt._system import CLEAR, progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Loop:
    """A loop with a clock of its own and a terminal that remembers."""

    def __init__(self, monkeypatch, stream):
        self.now, self.stream = 0.0, stream
        monkeypatch.setattr(_system, "sys", SimpleNamespace(stderr=stream))
        monkeypatch.setattr(_system, "time", SimpleNamespace(monotonic=lambda: self.now))

    def run(self, count, seconds, fails_at=None):
        """The line on the terminal in every turn."""
        lines = []
        for item in progress(range(count), "trying"):
            self.now += seconds
            lines.append(self.stream.getvalue().rpartition(CLEAR)[2])
            if item == fails_at:
                raise RuntimeError(item)
        return lines


@pytest.fixture
def loop(monkeypatch):
    return Loop(monkeypatch, Terminal())


def test_the_remaining_time_is_right(loop):
    lines = loop.run(10, 2.0)
    assert lines[:3] == ["", "", ""]
    assert lines[3] == "trying: 3 of 10, about 14 s left"
    assert lines[9] == "trying: 9 of 10, about 2 s left"
    assert loop.stream.getvalue().endswith(CLEAR)


def test_minutes_where_there_are_many(loop):
    assert loop.run(100, 30.0)[1] == "trying: 1 of 100, about 50 min left"


@pytest.mark.parametrize("seconds", [0.01, 0.4])
def test_short_loops_say_nothing(loop, seconds):
    loop.run(10, seconds)
    assert loop.stream.getvalue() == ""


def test_nothing_is_written_where_there_is_no_terminal(monkeypatch):
    loop = Loop(monkeypatch, io.StringIO())
    loop.run(10, 10.0)
    assert loop.stream.getvalue() == ""


def test_the_line_is_cleared_after_an_error(loop):
    with pytest.raises(RuntimeError, match="5"):
        loop.run(10, 10.0, fails_at=5)
    text = loop.stream.getvalue()
    assert "5 of 10" in text
    assert text.endswith(CLEAR)
