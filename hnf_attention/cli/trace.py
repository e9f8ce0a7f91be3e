"""`hnf-attention trace`: find where NaN or inf begins in one step of a user's function or a Hugging Face model."""

from __future__ import annotations

import argparse
from contextlib import redirect_stdout

from rich.text import Text

from ..errors import InputError
from ..replay import trace_non_finite
from ..versions import versions
from .exit_codes import FOUND, HEALTHY
from .messages import one_line
from .output import check_targets, for_people, write_document
from .progress import shown_progress
from .trace_target import is_function, step_of_function, step_of_model

SCHEMA_VERSION = 1


def run(options: argparse.Namespace) -> int:
    file = options.target.rpartition(":")[0] or None
    check_targets({"--json": options.json}, [options.text, options.inputs, file])
    screen = for_people(options.json)
    # What the user's own code prints does not belong into the document.
    with redirect_stdout(screen.file), shown_progress() as show:
        step = step_of_function(options) if is_function(options.target) else step_of_model(options, show)
        try:
            trace = trace_non_finite(**step, wide=not options.no_wide, folder=options.out, progress=show)
        except (ImportError, TypeError, ValueError) as error:
            raise InputError(one_line(error)) from error
        except (RuntimeError, IndexError, KeyError, AttributeError) as error:  # of the user's own step
            raise InputError(
                f"{options.target}: the step failed: {type(error).__name__}: {one_line(error)}"
            ) from error
    screen.print(Text(str(trace)), soft_wrap=True)
    head = {"schema_version": SCHEMA_VERSION, "versions": versions("hnf-attention", "torch")}
    write_document(options.json, {**head, "target": options.target, **trace.to_dict()})
    return FOUND if trace.found else HEALTHY
