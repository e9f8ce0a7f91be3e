"""Completion in a shell: the script knows every command and option, and files where files go."""

import shutil
import subprocess
import sys

import pytest

from hnf_attention.cli.main import main
from hnf_attention.cli.parser import SHELLS, make_parser


def script(shell, capsys):
    pytest.importorskip("shtab")
    assert main(["--print-completion", shell]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_knows_every_command_and_option(shell, capsys):
    text = script(shell, capsys)
    (commands,) = (action for action in make_parser()._actions if action.dest == "command")
    for name, command in commands.choices.items():
        assert name in text
        for action in command._actions:
            for option in action.option_strings:
                assert option.lstrip("-") in text, (name, option)


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["hnf-attention", "wa"], {"watch"}),
        (["hnf-attention", "report", "--ti"], {"--title"}),
        (["hnf-attention", "check", "de"], {"design.json"}),
        (["hnf-attention", "check", "--fail-on", ""], {"unstable", "marginal"}),
    ],
)
def test_bash_completes(words, found, capsys, tmp_path):
    (tmp_path / "complete.bash").write_text(script("bash", capsys))
    (tmp_path / "design.json").write_text("{}")
    line = (
        "source complete.bash; f=$(complete -p hnf-attention | sed 's/.*-F \\([^ ]*\\).*/\\1/');"
        ' COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); "$f" hnf-attention "${COMP_WORDS[$COMP_CWORD]}" x;'
        ' printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", line, "bash", *words], cwd=tmp_path, capture_output=True, text=True, timeout=30
    )
    assert {reply.strip() for reply in done.stdout.split()} >= found, done.stderr


def test_without_shtab_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["--print-completion", "zsh"]) == 2
    assert "pip install 'hnf-attention[completion]'" in capsys.readouterr().err


def test_another_shell_is_refused(capsys):
    assert main(["--print-completion", "cmd"]) == 2
    assert "invalid choice: 'cmd'" in capsys.readouterr().err
