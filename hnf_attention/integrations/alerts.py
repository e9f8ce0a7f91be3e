"""Ready-made `on_alert` callbacks of a monitor: a webhook, and a command. Each works on a thread of its own."""

from __future__ import annotations

import json
import subprocess  # nosec B404
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from ..diagnosis import StabilityIssue
from .alert_text import body, subject
from .background import PATIENCE, Background

_ATTEMPTS = 3
_SUBJECT = "{subject}"
_SAID = 200  # characters of what a command wrote to standard error


class _AlertSender:
    """Hands each list of issues to a thread, which sends it within a time limit.

    A failure is logged once, and the alert tried three times in all.
    """

    def __init__(self, timeout: float) -> None:
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout < 3600:
            raise ValueError(f"expected timeout to be seconds, over 0 and under 3600, got {timeout!r}")
        self._timeout = float(timeout)
        self._background = Background(repr(self), "alerts", _ATTEMPTS)

    def __call__(self, issues: Sequence[StabilityIssue]) -> None:
        """Send the issues. Returns at once and raises nothing."""
        self._background.put(partial(self._send, list(issues)))

    def flush(self, timeout: float = PATIENCE) -> bool:
        """Wait until every alert is sent or dropped. Returns whether nothing waits any more."""
        return self._background.flush(timeout)

    def _send(self, issues: list[StabilityIssue]) -> None:
        raise NotImplementedError


class WebhookAlert(_AlertSender):
    """Posts alerts to a webhook: `AttentionStabilityMonitor(model, on_alert=WebhookAlert("https://..."))`.

    url: of an incoming webhook, http or https. Log lines name its host alone, because the rest is a secret. A
        redirection is a failure: it would arrive without the alert.
    payload: what is posted as JSON, made of the list of issues. None makes {"text": ...}, which Slack, Mattermost,
        Rocket.Chat, Google Chat and, at URLs that end in /slack, Discord take.
    timeout: seconds for each answer of the server.

    Raises ValueError for another kind of URL or a bad timeout, TypeError for a URL that is no string or a payload
    that cannot be called.
    """

    def __init__(
        self,
        url: str,
        *,
        payload: Callable[[list[StabilityIssue]], Any] | None = None,
        timeout: float = 10.0,
    ):
        url, host = _checked(url)
        if payload is not None and not callable(payload):
            raise TypeError(f"expected payload to be None or a callable, got {payload!r}")
        self._url, self._host, self._payload = url, host, payload or chat_message
        self._opener = urllib.request.build_opener(_NoRedirection)
        super().__init__(timeout)

    def __repr__(self) -> str:
        return f"WebhookAlert({self._host})"

    def _send(self, issues: list[StabilityIssue]) -> None:
        request = urllib.request.Request(
            self._url,
            data=json.dumps(self._payload(issues)).encode(),
            headers={"Content-Type": "application/json"},
            method="POST",
        )
        try:
            with self._opener.open(request, timeout=self._timeout):
                pass
        except urllib.error.HTTPError as error:
            error.close()
            raise OSError(f"{self._host} answered {error.code} {error.reason}") from None


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    """Python turns a POST that is redirected into a GET without its data."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _checked(url: str) -> tuple[str, str]:
    """The URL, and its host. What is raised names no part of it but the scheme."""
    if not isinstance(url, str):
        raise TypeError(f"expected the URL of a webhook as a string, got {type(url).__name__}")
    url = url.strip()  # of a file, it may end in a new line
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ValueError("expected the URL of a webhook, got one whose host or port is none") from None
    if parts.scheme not in ("http", "https") or not host:
        raise ValueError(
            f"expected the URL of a webhook, http or https, got one of {parts.scheme or 'no'} scheme"
        )
    if parts.username is not None:
        raise ValueError(
            "expected the URL of a webhook without a user's name and password, got one with them"
        )
    if not url.isascii() or any(each.isspace() or not each.isprintable() for each in url):
        raise ValueError("expected the URL of a webhook in ASCII, without spaces, got other characters")
    return url, host


class CommandAlert(_AlertSender):
    """Runs a command for alerts: `on_alert=CommandAlert(["mail", "-s", "{subject}", "me@example.org"])`.

    arguments: the program and its arguments. No shell reads them. "{subject}" in an argument becomes a line such as
        "Attention: 2 errors, 1 warning"; standard input is a line for each group of heads.
    timeout: seconds until the command is killed.

    An exit code other than 0 is a failure. Raises TypeError for anything but a list of strings, ValueError for an empty
    one or a bad timeout.
    """

    def __init__(self, arguments: Sequence[str], *, timeout: float = 30.0):
        if isinstance(arguments, str) or not all(isinstance(each, str) for each in arguments):
            raise TypeError(f"expected a list of the program and its arguments, got {arguments!r}")
        if not arguments:
            raise ValueError("expected a list of the program and its arguments, got an empty one")
        self._arguments = list(arguments)
        super().__init__(timeout)

    def __repr__(self) -> str:
        return f"CommandAlert({self._arguments[0]})"

    def _send(self, issues: list[StabilityIssue]) -> None:
        # Without a shell. A file: of a pipe, the end comes with the last process that the command left behind.
        with tempfile.TemporaryFile() as stderr:
            try:
                done = subprocess.run(  # nosec B603
                    [each.replace(_SUBJECT, subject(issues)) for each in self._arguments],
                    input=(body(issues) + "\n").encode("utf-8", "replace"),
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                    timeout=self._timeout,
                )
            except subprocess.TimeoutExpired:  # which names the arguments; they may hold a password
                raise TimeoutError(f"killed after {self._timeout:g} s") from None
            if done.returncode:
                stderr.seek(0)
                said = stderr.read(4 * _SAID).decode("utf-8", "replace").strip()[:_SAID]
                raise OSError(f"exit code {done.returncode}{': ' if said else ''}{said}")


def chat_message(issues: Sequence[StabilityIssue]) -> dict[str, str]:
    """{"text": ...} as Slack reads it: a bold line, then one for each group of heads."""
    text = f"*{subject(issues)}*\n{body(issues)}"
    # A layer's name must not become a link, or call everyone in the channel.
    return {"text": text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")}
