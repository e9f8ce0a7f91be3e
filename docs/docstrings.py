"""How the API reference shows this project's docstrings: their argument lines become lists.

A docstring describes an argument by a line `name: what it is`, whose continuation lines are indented. Markdown
would join such lines into one paragraph. This extension of Griffe turns each of them into a list item.
"""

from __future__ import annotations

import re

import griffe

_NAME = r"[a-z_]\w*(?: \([^)]*\))?"  # with a shape after it, perhaps
ARGUMENT = re.compile(rf"^(?P<names>{_NAME}(?:, {_NAME})*): (?P<text>\S.*)$")


def as_lists(text: str) -> str:
    """The docstring with every argument line as a list item, its continuation lines included."""
    lines, inside = [], False
    for line in text.splitlines():
        match = ARGUMENT.match(line)
        if match:
            lines += [] if inside else [""]
            lines.append(f"- **{match['names']}**: {match['text']}")
            inside = True
        elif inside and line.startswith("    "):
            lines.append(line)
        else:
            lines += ["", line] if inside and line else [line]
            inside = False
    return "\n".join(lines)


class ArgumentLists(griffe.Extension):
    """Rewrites each docstring while the package is read."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_lists(obj.docstring.value)
