"""`hnf-attention watch` in a terminal of 80 and of 200 columns, while a run goes on."""

import sys

import numpy as np
import pytest
from heads import head_stats
from test_watch import lines_of

from hnf_attention.diagnosis import diagnose
from hnf_attention.run_log import RunLogWriter
from hnf_attention.statistics.heads import Snapshot

terminals = pytest.importorskip("terminals", reason="pseudo terminals are POSIX's", exc_type=ImportError)
LAYERS, HEADS = 10, 40
NAME = "model.decoder.layers.{}.self_attention_with_a_long_name"


class Growing:
    """A run log that grows: heads 4 to 7 of one layer run away from step 60 on."""

    def __init__(self, path, layers=LAYERS):
        self.writer, self.history, self.layers, self.step = RunLogWriter(path), [], layers, 0

    def on(self, steps):
        for _ in range(steps):
            self.step += 10
            found = {}
            for layer in range(self.layers):
                scores = np.full(HEADS, 4.0 + layer / 10)
                if layer == 7:
                    scores[4:8] = 4.0 * 1.5 ** max(self.step // 10 - 6, 0)
                found[NAME.format(layer)] = head_stats(HEADS, max_logit=scores)
            self.history = [*self.history, Snapshot(self.step, found)][-10:]
            self.writer.note(self.step, loss=5.0 / self.step)
            self.last = diagnose(self.history)
            self.writer.write(self.last)
        assert self.writer.flush()


@pytest.mark.slow
@pytest.mark.parametrize(("columns", "rows"), [(80, 24), (200, 50)])
def test_every_frame_fits_the_terminal_while_the_run_goes_on(tmp_path, columns, rows):
    run = Growing(tmp_path / "run.db")
    run.on(1)
    command = [sys.executable, "-m", "hnf_attention", "watch", str(tmp_path / "run.db"), "--every", "0.2"]
    terminal = terminals.Terminal(command, columns, rows)
    try:
        for upto in (10, 100, 160):
            run.on((upto - run.step) // 10)
            terminal.read(lambda shown, last=f"step {upto}": shown.screen()[0].startswith(f"{last},"), 30)
            lines = terminal.screen()
            assert all(len(line) <= columns for line in lines), "\n".join(lines)
            assert len([line for line in lines if line]) <= rows
            assert f"{LAYERS} layers, {LAYERS * HEADS} heads" in lines[0]
        assert any("layer 7 heads 4-7: scores range" in line for line in lines)
        assert terminal.interrupt() == int(bool(run.last.errors))
    finally:
        terminal.close()
        run.writer.close()


@pytest.mark.slow
def test_heads_whose_issue_changed_together_share_a_line_and_issues_fill_what_is_left(tmp_path):
    run = Growing(tmp_path / "run.db", layers=8)
    run.on(14)
    run.writer.close()
    lines = lines_of(tmp_path / "run.db", 80, 40)
    said = [line for line in lines if "scores range " in line]
    assert said and all("layer 7 heads 4-7: scores range" in line for line in said)
    assert all(len(line) <= 80 for line in lines) and len(lines) <= 40
    assert len(said) == len({line.split(":")[0] for line in said})
