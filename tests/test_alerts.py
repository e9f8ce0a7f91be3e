"""Ready-made alerts: what a webhook and a command receive, and what happens when they fail."""

import json
import os
import sys
import threading
import traceback
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from attention_models import Model, x
from heads import diagnoses

from hnf_attention import AttentionStabilityMonitor, StabilityIssue
from hnf_attention.integrations import CommandAlert, WebhookAlert, background
from hnf_attention.integrations.alert_text import body, subject
from hnf_attention.integrations.alerts import chat_message

ISSUES = [issue for issue in diagnoses()[0].issues if issue.severity != "note"]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(background, "_LONGEST_PAUSE", 0.001)


@pytest.fixture
def server():
    """A webhook: `posts` is what came, `answers` the codes to give first, `wait` what each answer waits for."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.server.wait.wait(10)
            length = int(self.headers["Content-Length"])
            self.server.posts.append((self.headers["Content-Type"], json.loads(self.rfile.read(length))))
            self.send_response(self.server.answers.pop(0) if self.server.answers else 200)
            self.send_header("Location", "/")
            self.end_headers()

        def do_GET(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            """Say nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.posts, server.answers, server.wait = [], [], threading.Event()
    server.wait.set()
    server.url = f"http://127.0.0.1:{server.server_port}/services/SECRET"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.wait.set()
    server.shutdown()
    server.server_close()


def test_the_text_counts_and_groups():
    assert subject(ISSUES) == f"Attention: {len(ISSUES)} warnings"
    lines = body(ISSUES).splitlines()
    assert lines[0].startswith("warning: h.1.attn heads 0-3: ")
    error = StabilityIssue("h.9", 1, "non_finite", "error", 1.0, 0.0, "s", "e", "f", "NaN -> stop")
    assert subject([*ISSUES, error]).startswith("Attention: 1 error, ")
    assert body([*ISSUES, error]).splitlines()[0] == "error: h.9 head 1: NaN -> stop"
    many = [StabilityIssue(f"h.{i}", 0, "non_finite", "error", 1.0, 0.0, "s", "e", "f") for i in range(40)]
    assert len(body(many).splitlines()) == 11 and body(many).endswith("and 30 more")


def test_a_layers_name_cannot_call_a_channel_or_make_a_link():
    issue = StabilityIssue("<!channel>&<https://x>", None, "non_finite", "error", 1, 0, "s", "e", "f")
    text = chat_message([issue])["text"]
    assert "&lt;!channel&gt;&amp;" in text and "<" not in text


@pytest.mark.slow
def test_a_webhook_gets_what_a_monitor_finds(server):
    alert, model, same = WebhookAlert(server.url), Model(), x()
    for block in model.blocks:
        block.attn.qkv.weight.data[:32] *= 30.0
    with AttentionStabilityMonitor(model, log_every=1, on_alert=alert) as monitor:
        for _ in range(2):
            model(same)
            diagnosis = monitor.on_step()
    assert alert.flush()
    found = [issue for issue in diagnosis.issues if issue.severity != "note"]
    assert found and server.posts == [
        ("application/json", chat_message(found))
    ]  # once: it is no news afterwards


def test_the_payload_can_be_another(server):
    alert = WebhookAlert(server.url, payload=lambda issues: {"content": len(issues)})
    alert(ISSUES)
    assert alert.flush() and [what for _, what in server.posts] == [{"content": len(ISSUES)}]


@pytest.mark.parametrize(("answers", "posts", "lines"), [([500], 2, 2), ([500] * 3, 3, 1)])
def test_a_webhook_that_refuses_gives_one_warning_and_keeps_its_secret(
    server, quick, caplog, answers, posts, lines
):
    server.answers += answers
    alert = WebhookAlert(server.url)
    alert(ISSUES)
    assert alert.flush() and len(server.posts) == posts
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == lines and "127.0.0.1 answered 500" in said[0] and "SECRET" not in caplog.text


@pytest.mark.parametrize("code", [301, 302, 303, 307])
def test_a_redirection_would_lose_the_alert_and_is_a_failure(server, quick, caplog, code):
    server.answers += [code] * 3
    alert = WebhookAlert(server.url)
    alert(ISSUES)
    assert alert.flush() and len(server.posts) == 3
    assert f"127.0.0.1 answered {code}" in caplog.text and "SECRET" not in caplog.text


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://host/SECRET x", "in ASCII, without spaces"),
        ("https://host/SECR\u00c9T", "in ASCII, without spaces"),
        ("https://me:SECRET@host/x", "without a user's name"),
        ("https://host:SECRET/x", "whose host or port is none"),
    ],
)
def test_what_no_request_can_be_made_of_is_refused_at_once_and_not_shown(url, expected):
    with pytest.raises(ValueError, match=expected) as caught:
        WebhookAlert(url)
    assert "SECR" not in "".join(traceback.format_exception(caught.value))
    with pytest.raises(TypeError, match="as a string, got NoneType"):
        WebhookAlert(None)


def test_a_url_of_a_file_may_end_in_a_new_line(server):
    alert = WebhookAlert(f"{server.url}\n")
    alert(ISSUES)
    assert alert.flush() and len(server.posts) == 1


def test_a_webhook_that_does_not_answer_is_left_after_its_time(server, quick, caplog):
    server.wait.clear()
    alert = WebhookAlert(server.url, timeout=0.05)
    alert(ISSUES)
    assert alert.flush() and len(caplog.records) == 1
    assert "SECRET" not in caplog.text


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/x", "hooks.slack.com/x", "https:///x", ""])
def test_only_urls_of_webhooks_are_taken(url):
    with pytest.raises(ValueError, match="expected the URL of a webhook, http or https"):
        WebhookAlert(url)


def test_a_command_gets_the_subject_and_the_lines(tmp_path):
    out = tmp_path / "out.json"
    code = "import json, sys; json.dump([sys.argv[2:], sys.stdin.read()], open(sys.argv[1], 'w'))"
    alert = CommandAlert([sys.executable, "-c", code, str(out), "{subject}", "$HOME; rm -rf x"])
    alert(ISSUES)
    assert alert.flush()
    assert json.loads(out.read_text()) == [[subject(ISSUES), "$HOME; rm -rf x"], body(ISSUES) + "\n"]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys; sys.exit('no such list')", "exit code 1: no such list"),
        ("import time; time.sleep(60)", "killed after 0.3 s"),
    ],
)
def test_a_command_that_fails_gives_one_warning(quick, caplog, code, said):
    alert = CommandAlert([sys.executable, "-S", "-c", code, "SECRET"], timeout=0.3)
    alert(ISSUES)
    assert alert.flush() and len(caplog.records) == 1 and said in caplog.text and "SECRET" not in caplog.text


@pytest.mark.skipif(os.name != "posix", reason="a POSIX shell's")
def test_a_command_may_leave_a_process_behind(caplog):
    alert = CommandAlert(["sh", "-c", "sleep 1 & exit 0"], timeout=0.5)
    alert(ISSUES)
    assert alert.flush() and not caplog.records


def test_a_command_that_does_not_exist_gives_one_warning(quick, caplog):
    alert = CommandAlert(["/nowhere/command"])
    alert(ISSUES)
    assert alert.flush() and len(caplog.records) == 1
    assert "CommandAlert(/nowhere/command) failed (FileNotFoundError" in caplog.records[0].getMessage()


def test_bad_arguments_are_refused():
    with pytest.raises(TypeError, match="expected a list of the program and its arguments, got 'mail me'"):
        CommandAlert("mail me")
    with pytest.raises(ValueError, match="an empty one"):
        CommandAlert([])
    with pytest.raises(TypeError, match="expected payload to be None or a callable"):
        WebhookAlert("https://x.org/y", payload={})
    for timeout in (0, -1.0, float("nan"), True, "1"):
        with pytest.raises(ValueError, match="expected timeout to be seconds"):
            CommandAlert(["true"], timeout=timeout)
