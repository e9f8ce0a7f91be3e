"""Messages of one line."""

from __future__ import annotations

from difflib import get_close_matches

LONGEST = 300  # characters of somebody else's message; lists of every known model are longer


def one_line(error: BaseException) -> str:
    """The first line of an error's message, at most `LONGEST` characters of it; the error's type if it is empty.

    The lines that follow are taken too if the first one ends with a colon, which announces them.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    text = " ".join(lines) if lines[0].endswith(":") else lines[0]
    return text if len(text) <= LONGEST else f"{text[:LONGEST].rsplit(' ', 1)[0]} ..."


def nearest(name: str, known: list[str]) -> str:
    """'; did you mean NAME?' for the known name that is most like it, or nothing."""
    found = get_close_matches(name, known, n=1)
    return f"; did you mean {found[0]}?" if found else ""
