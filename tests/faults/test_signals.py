"""SIGTERM and Ctrl-C: the rung is finished and written, nothing is measured, a resume goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from searches import RANDOM, Command, assert_nothing_lost, assert_the_same, search, spec_of

from desisky_tune.errors import INTERRUPTED, RESUME_ME, SearchInterrupted
from desisky_tune.ray_session import ray_session
from desisky_tune.search.records import TrialRecord
from desisky_tune.search.run import resume_search
from desisky_tune.search.stopping import StopRequest, stop_signals


def assert_stopped(command: Command, run: Path, code: int) -> None:
    """It ended with this code, measured nothing, and said in its last line how to go on."""
    assert command.ends() == code
    assert not (run / "evaluation.json").exists()
    assert not (run / "best").exists()
    assert f"continue with 'desisky-tune resume {run}'" in command.lines[-1]
    assert "Traceback" not in "\n".join(command.lines)


@pytest.mark.usefixtures("long_form")
def test_a_search_that_is_stopped_again_and_again_loses_nothing(
    tmp_path: Path, undisturbed: list[TrialRecord], address: str
) -> None:
    run = tmp_path / "cut"
    command = search(tmp_path, "cut", RANDOM, "--address", address)
    command.until("COMPLETE")
    command.send(signal.SIGTERM)
    assert_stopped(command, run, os.EX_TEMPFAIL)
    assert any("SIGTERM: the trials that run finish their rungs" in x for x in command.lines)

    command = search(tmp_path, "cut", RANDOM, "--address", address)
    command.until("at epoch", "COMPLETE")
    command.send(signal.SIGINT)
    command.until("Ctrl-C: the trials that run finish their rungs")
    command.send(signal.SIGINT)
    assert_stopped(command, run, INTERRUPTED)

    assert search(tmp_path, "cut", RANDOM, "--address", address).ends() == 0
    assert_the_same(assert_nothing_lost(run, spec_of(RANDOM)), undisturbed)


def test_before_the_run_there_is_nothing_to_resume() -> None:
    with (
        pytest.raises(SearchInterrupted, match="SIGTERM; nothing had begun") as stop,
        stop_signals(),
    ):
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.value.exit_code == RESUME_ME


def test_while_ray_starts_sigterm_is_rays_and_means_the_same() -> None:
    def start() -> None:
        # So `ray.init` answers it until the search takes the signal back.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SearchInterrupted, match="SIGTERM") as stop, stop_signals():
        start()
    assert stop.value.exit_code == RESUME_ME


def test_a_resume_that_is_stopped_while_its_run_is_opened_is_to_be_resumed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def download(path: str) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def unheard(number: int, frame: object) -> None:
        raise AssertionError("ended with the signal")

    monkeypatch.setattr("desisky_tune.search.run.open_run", download)
    before = signal.signal(signal.SIGTERM, unheard)
    try:
        with pytest.raises(SearchInterrupted, match="desisky-tune resume s3://runs/deep") as stop:
            resume_search("s3://runs/deep")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stop.value.exit_code == RESUME_ME


def test_another_exit_stays_what_it_is() -> None:
    with pytest.raises(SystemExit) as end, stop_signals():
        sys.exit(3)
    assert end.value.code == 3


def test_the_handlers_before_come_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with stop_signals():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_outside_the_main_thread_no_signal_is_taken() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def in_a_thread() -> None:
        with stop_signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    assert seen == [before]


def asked(*running: int, grace: float = 60.0) -> StopRequest:
    """A request that came while trials ran."""
    stop = StopRequest(grace=grace)
    with stop.finishing_rungs():
        for number in running:
            stop.began(number)
        stop._receive(signal.SIGTERM, None)
    return stop


def test_a_search_that_was_not_asked_goes_on() -> None:
    stop = StopRequest()
    assert not stop.is_due


def test_it_waits_for_each_trial_that_ran_and_no_other() -> None:
    stop = asked(3, 5)
    stop.began(7)
    stop.reported(7)
    assert not stop.is_due
    stop.reported(3)
    assert not stop.is_due
    stop.ended(5)
    assert stop.is_due


def test_it_waits_no_longer_than_the_grace() -> None:
    assert asked(3, grace=0.0).is_due


def test_with_no_trial_running_it_is_due_at_once() -> None:
    assert asked().is_due


def test_a_second_signal_interrupts() -> None:
    stop = asked(3)
    with pytest.raises(KeyboardInterrupt), stop.finishing_rungs():
        stop._receive(signal.SIGINT, None)
    assert stop.interruption().exit_code == RESUME_ME


def test_what_a_library_makes_of_a_signal_is_an_interruption() -> None:
    """SIGTERM in the middle of somebody else's code, which raises an error of its own for it."""

    def library() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt as swallowed:
            raise SystemError("returned a result with an exception set") from swallowed

    with pytest.raises(SearchInterrupted, match="stopped by SIGTERM") as ended, stop_signals():
        library()
    assert ended.value.exit_code == RESUME_ME


def test_an_error_without_a_signal_stays_one() -> None:
    with pytest.raises(ValueError, match="a bug"), stop_signals():
        raise ValueError("a bug")


def test_a_signal_is_an_interruption_wherever_it_is_caught() -> None:
    with stop_signals() as stop:
        with pytest.raises(SearchInterrupted) as ended:
            signal.raise_signal(signal.SIGTERM)
        assert stop.terminated
    assert ended.value.exit_code == RESUME_ME


def test_no_alarm_of_ray_s_cuts_the_end_short() -> None:
    """Ray's C++ handler of SIGTERM sets an alarm that aborts, and then calls ours."""
    before = signal.getsignal(signal.SIGALRM)
    assert before == signal.SIG_DFL
    signal.alarm(60)
    with stop_signals(), pytest.raises(SearchInterrupted):
        signal.raise_signal(signal.SIGTERM)
    assert signal.alarm(0) == 0


@pytest.mark.parametrize("when", ["while Ray starts", "while Ray runs", "before Ray"])
def test_nor_where_ray_s_own_python_handler_ends_the_process(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That one raises SystemExit: whatever ends Ray then has all the time that it takes."""
    left: list[int] = []

    def terminated(**_: object) -> None:
        signal.alarm(60)
        raise SystemExit(signal.SIGTERM)

    def started(**_: object) -> None:
        """A Ray that starts."""

    ray = SimpleNamespace(
        init=terminated if when == "while Ray starts" else started,
        is_initialized=lambda: False,
        shutdown=lambda: left.append(signal.alarm(0)),
    )
    monkeypatch.setitem(sys.modules, "ray", ray)

    def search() -> None:
        with stop_signals():
            if when == "before Ray":
                terminated()
            with ray_session():
                terminated()

    with pytest.raises(SearchInterrupted, match="SIGTERM"):
        search()
    assert left == ([0] if when == "while Ray runs" else [])
    assert signal.alarm(0) == 0


def test_a_sigterm_that_rays_start_swallows_is_heard_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray's handler raises SystemExit wherever the signal finds it: also where that is lost."""
    ended = []

    def start(**_: object) -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
        with suppress(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)

    ray = SimpleNamespace(
        init=start, is_initialized=lambda: False, shutdown=lambda: ended.append(True)
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    wakeup = signal.set_wakeup_fd(-1)
    assert wakeup == -1
    with pytest.raises(SearchInterrupted, match="SIGTERM") as stop, stop_signals(), ray_session():
        pytest.fail("the search began")
    assert stop.value.exit_code == RESUME_ME
    assert ended == [True]
    assert signal.set_wakeup_fd(-1) == -1


CUT_OFF = """
import atexit, os, signal, sys, types

def init(**settings):
    atexit.register(os.kill, os.getpid(), signal.SIGSEGV)
    raise SystemExit(signal.SIGTERM)

sys.modules["ray"] = types.SimpleNamespace(init=init, is_initialized=lambda: False)
sys.modules["ray.exceptions"] = types.SimpleNamespace(AuthenticationError=RuntimeError)

from desisky_tune.cli import entry
from desisky_tune.ray_session import ray_session
from desisky_tune.search.stopping import stop_signals

@entry.app.command()
def begin() -> None:
    print("begun")
    with stop_signals(), ray_session():
        pass

sys.argv = ["desisky-tune", "begin"]
entry.program()
"""


def test_a_start_of_ray_that_was_cut_off_does_not_change_the_exit_code() -> None:
    """Python's end would run Ray's own, which can crash then."""
    done = subprocess.run([sys.executable, "-c", CUT_OFF], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (os.EX_TEMPFAIL, "begun\n")
    assert done.stderr == "desisky-tune: stopped by SIGTERM; nothing had begun\n"


def test_an_alarm_that_somebody_else_handles_is_left_alone() -> None:
    before = signal.signal(signal.SIGALRM, lambda number, frame: None)
    try:
        signal.alarm(60)
        with stop_signals(), pytest.raises(SearchInterrupted):
            signal.raise_signal(signal.SIGTERM)
        assert signal.alarm(0) > 0
    finally:
        signal.signal(signal.SIGALRM, before)
