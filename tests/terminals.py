"""A program in a pseudo terminal, and what its screen shows."""

import codecs
import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time

_HOME = "\x1b[H"  # each frame begins with it
_SEQUENCE = re.compile(r"\x1b(?:\[([0-9;?]*)([A-Za-z])|[()][A-Z0-9]|[=>78])")


class Terminal:
    """Runs a command in a terminal of so many columns and rows. `text` is all that it wrote."""

    def __init__(self, command, columns, rows, environment=None):
        self._columns, self._rows = columns, rows
        self._own, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        settings = {**os.environ, "TERM": "xterm-256color", **(environment or {})}
        for name in ("COLUMNS", "LINES", "NO_COLOR"):
            settings.pop(name, None)
        # A shell lets its background jobs ignore Ctrl-C, and what they start inherits that.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            self._process = subprocess.Popen(
                command, stdin=theirs, stdout=theirs, stderr=theirs, env=settings, start_new_session=True
            )
        finally:
            signal.signal(signal.SIGINT, before)
        os.close(theirs)
        self.text, self._decoder = "", codecs.getincrementaldecoder("utf-8")("replace")

    def read(self, until, seconds=60.0):
        """Read until `until(self)` holds. Raises TimeoutError."""
        end = time.monotonic() + seconds
        while not until(self):
            if time.monotonic() > end:
                raise TimeoutError(f"the terminal never showed it; it shows\n{self.screen()}")
            self._more()

    def _more(self):
        if select.select([self._own], [], [], 0.1)[0]:
            with contextlib.suppress(OSError):  # the program has ended
                self.text += self._decoder.decode(os.read(self._own, 1 << 16))

    def interrupt(self):
        """Ctrl-C; returns the exit code."""
        os.killpg(self._process.pid, signal.SIGINT)
        self.read(lambda _: self._process.poll() is not None)
        return self._process.returncode

    def close(self):
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        os.close(self._own)

    def screen(self):
        """The last whole frame, its lines as long as they were drawn: a terminal that wraps them would hide a fault."""
        frames = self.text.split(_HOME)
        return frame(frames[-2] if len(frames) > 1 else "", self._rows)


def frame(text, rows):
    """The rows of the screen after this output, without a limit on their width. Colours are left out."""
    lines, row, column, place = [[] for _ in range(rows)], 0, 0, 0
    while place < len(text):
        found = _SEQUENCE.match(text, place)
        if found:
            place = found.end()
            row, column = _moved(lines, row, column, found[1] or "", found[2] or "")
            continue
        character = text[place]
        place += 1
        if character == "\r":
            column = 0
        elif character == "\n":
            row = min(row + 1, rows - 1)
        elif character >= " ":
            line = lines[row]
            line.extend(" " * (column + 1 - len(line)))
            line[column] = character
            column += 1
    return ["".join(line).rstrip() for line in lines]


def _moved(lines, row, column, numbers, command):
    """The cursor after a control sequence, which may also clear."""
    first = int(numbers.split(";")[0]) if numbers.split(";")[0].isdigit() else None
    if command == "H":
        second = numbers.partition(";")[2]
        return (first or 1) - 1, (int(second) if second.isdigit() else 1) - 1
    if command == "A":
        return max(row - (first or 1), 0), column
    if command == "J" and first in (2, 3):
        for line in lines:
            line.clear()
    if command == "K" and first == 2:
        lines[row].clear()
    if command == "G":
        return row, (first or 1) - 1
    return row, column
