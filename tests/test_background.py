"""The thread that writers for trackers and alerts share: order, attempts, what is dropped, what is said."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
import weakref

import pytest

from hnf_attention.integrations import background
from hnf_attention.integrations.background import MOST_WAITING, Background


@pytest.fixture
def quick(monkeypatch):
    """Pauses between attempts of a millisecond."""
    monkeypatch.setattr(background, "_LONGEST_PAUSE", 0.001)


def failing(times, done, name):
    """A job that raises so often before it works."""
    left = [times]

    def job():
        if left[0]:
            left[0] -= 1
            raise OSError("away")
        done.append(name)

    return job


def test_jobs_run_in_order_on_another_thread():
    work, seen = Background("w", "jobs", 3), []
    for number in range(20):
        work.put(lambda number=number: seen.append((number, threading.current_thread())))
    assert work.flush()
    assert [number for number, _ in seen] == list(range(20))
    assert threading.main_thread() not in {thread for _, thread in seen}
    work.close()


@pytest.mark.parametrize(("times", "done"), [(0, ["a", "b"]), (2, ["a", "b"]), (3, ["b"])])
def test_a_job_that_fails_is_tried_again_and_dropped_at_last(quick, caplog, times, done):
    work, seen = Background("the service", "jobs", 3), []
    work.put(failing(times, seen, "a"))
    work.put(failing(0, seen, "b"))
    assert work.flush() and seen == done
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    if times:
        dropped = 2 - len(done)
        assert said[0].startswith("the service failed (OSError: away); training goes on")
        assert said[1:] == [f"the service works again; jobs dropped: {dropped}"]
    else:
        assert said == []
    work.close()


def test_a_service_that_hangs_costs_the_caller_nothing_and_the_oldest_are_dropped():
    go, begun, seen = threading.Event(), threading.Event(), []
    work = Background("w", "jobs", 3)
    work.put(lambda: (begun.set(), go.wait()))
    assert begun.wait(5)
    start = time.perf_counter()
    for number in range(10 * MOST_WAITING):
        work.put(lambda number=number: seen.append(number))
    assert time.perf_counter() - start < 0.5
    assert not work.flush(0.01)
    go.set()
    assert work.flush() and seen == list(range(9 * MOST_WAITING, 10 * MOST_WAITING))
    work.close()


def test_an_outage_ends_with_the_number_of_jobs_that_were_dropped(caplog, monkeypatch):
    monkeypatch.setattr(background, "_LONGEST_PAUSE", 0.2)  # longer than it takes to fill the queue
    work, tried, back, seen = Background("w", "jobs", 100), threading.Event(), threading.Event(), []

    def job(number):
        tried.set()
        if not back.is_set():
            raise OSError("away")
        seen.append(number)

    work.put(lambda: job(-1))
    assert tried.wait(5)
    for number in range(MOST_WAITING + 4):
        work.put(lambda number=number: job(number))
    back.set()
    assert work.flush() and len(seen) == MOST_WAITING
    assert caplog.records[-1].getMessage() == "w works again; jobs dropped: 5"
    work.close()


def test_the_end_gives_each_job_a_last_attempt_and_says_what_was_lost(caplog):
    work, seen = Background("w", "jobs", 100), []
    for name in "abc":
        work.put(failing(10, seen, name))
    work.put(failing(0, seen, "d"))
    work.put(failing(10, seen, "e"))
    start = time.perf_counter()
    work.close()
    assert time.perf_counter() - start < 5 and seen == ["d"]
    said = [record.getMessage() for record in caplog.records]
    assert "w works again; jobs dropped: 3" in said and said[-1] == "w ends; jobs dropped: 1"


def test_a_service_that_hangs_is_left_at_the_end(caplog):
    go, work = threading.Event(), Background("w", "jobs", 3)
    work.put(go.wait)
    work.close(0.05)
    assert caplog.records[-1].getMessage() == "w is left after 0.05 s; jobs that wait: 1"
    go.set()


def test_work_that_is_closed_goes_on_with_a_later_job():
    work, seen = Background("w", "jobs", 3), []
    for name in "ab":
        work.put(failing(0, seen, name))
        work.close()
        work.close()
    assert seen == ["a", "b"]


def test_work_that_nobody_holds_ends_its_thread():
    work = Background("dropped", "jobs", 3)
    work.put(int)
    del work  # the last reference
    assert not [thread for thread in threading.enumerate() if "dropped" in thread.name]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork is POSIX's")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_waits_for_nothing():
    work = Background("w", "jobs", 3)
    work.put(int)
    assert work.flush()
    child = os.fork()
    if not child:
        work.put(int)
        work.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    work.close()


@pytest.mark.slow
@pytest.mark.parametrize("job", ["lambda: print('sent')", "lambda: time.sleep(600)"])
def test_the_end_of_a_process_sends_what_waits_and_waits_for_nothing_else(job):
    code = (
        "import time; from hnf_attention.integrations import background; background.PATIENCE = 2.0;"
        f"work = background.Background('w', 'jobs', 3); work.put({job}); print('done')"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and time.perf_counter() - start < 60, done.stderr
    assert ("sent" in done.stdout) == ("sent" in job)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork is POSIX's")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_process_that_is_forked_while_the_thread_works_waits_for_nothing():
    work, go, ended = Background("w", "jobs", 3), threading.Event(), []
    work.put(go.wait)

    def fork():
        child = os.fork()
        if not child:
            signal.alarm(5)
            os._exit(0 if work.flush(60) and work.close() is None else 1)
        ended.append(os.waitpid(child, 0)[1])

    with work._worker._changed:  # as the thread holds it for moments
        other = threading.Thread(target=fork)
        other.start()
        other.join()
    go.set()
    work.close()
    assert ended == [0]


def test_a_job_that_would_end_the_thread_is_a_failure_as_others_are(quick, caplog):
    work, seen = Background("w", "jobs", 2), []
    work.put(lambda: sys.exit("no such account"))
    work.put(failing(0, seen, "b"))
    assert work.flush(5) and seen == ["b"]
    assert caplog.records[0].getMessage().startswith("w failed (SystemExit: no such account)")
    work.close()


def test_a_process_without_threads_gets_one_line_and_works_when_it_has_some(monkeypatch, caplog):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    work, seen = Background("w", "jobs", 2), []
    with monkeypatch.context() as patch:
        patch.setattr(background._Worker, "start", refuse)
        work.put(failing(0, seen, "a"))
        work.put(failing(0, seen, "b"))
        assert work.flush(0.0)
        work.close()
    work.put(failing(0, seen, "c"))
    assert work.flush(5) and seen == ["c"]
    assert [record.getMessage() for record in caplog.records] == [
        "w gets no thread (can't start new thread); jobs are dropped until it does"
    ]
    work.close()


def test_work_whose_jobs_hold_it_ends_its_thread_when_nobody_else_does():
    class Sender:
        def __init__(self):
            self.work = Background("held", "jobs", 3)

        def send(self):
            """Nothing."""

    sender = Sender()
    sender.work.put(sender.send)
    assert sender.work.flush()
    thread, gone = sender.work._worker, weakref.ref(sender)
    del sender
    thread.join(5)
    assert gone() is None and not thread.is_alive()
