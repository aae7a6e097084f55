"""Stopping: signals ask once, a second one kills, handlers come back, ranks agree, patience ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap

import pytest

from pretrain.training.progress import Progress
from pretrain.training.stopping import STOP_SIGNALS, StopRequest, should_stop_early


def this_rank(claim: bool) -> bool:
    return claim


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_a_request_and_handlers_come_back(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in STOP_SIGNALS]
    with StopRequest(this_rank) as stop:
        assert not stop.is_agreed()
        signal.raise_signal(number)
        assert stop.is_agreed()
        assert stop.reason == number.name
        signal.raise_signal(number)  # a launcher passing the same wish on: too soon to be a second one
    assert [signal.getsignal(each) for each in STOP_SIGNALS] == before


def test_handlers_come_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError, match="inside"), StopRequest(this_rank):
        raise RuntimeError("inside")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_rank_that_was_not_asked_stops_with_the_others() -> None:
    with StopRequest(lambda claim: True) as stop:
        assert stop.is_agreed()
        assert stop.reason is None


def test_a_request_by_call_keeps_the_first_reason() -> None:
    stop = StopRequest(this_rank)
    stop.request("time limit")
    stop.request("early stopping")
    assert (stop.is_agreed(), stop.reason) == (True, "time limit")


def test_a_second_signal_ends_the_process_at_once() -> None:
    program = textwrap.dedent(
        """
        import signal
        from pretrain.training.stopping import StopRequest
        with StopRequest(lambda claim: claim, same_request_seconds=0.0):
            signal.raise_signal(signal.SIGTERM)
            print("still here", flush=True)
            signal.raise_signal(signal.SIGTERM)
            print("never", flush=True)
        """
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGTERM
    assert done.stdout == "still here\n"


def test_signals_after_the_last_save_change_nothing() -> None:
    program = textwrap.dedent(
        """
        import signal, sys
        from pretrain.training.stopping import StopRequest
        with StopRequest(lambda claim: claim, same_request_seconds=0.0) as stop:
            signal.raise_signal(signal.SIGTERM)
            stop.leave()
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        sys.exit(75)
        """
    )
    done = subprocess.run([sys.executable, "-c", program], timeout=120, check=False)
    assert done.returncode == 75


def test_patience() -> None:
    progress = Progress(evaluations_without_improvement=3)
    assert should_stop_early(progress, 3)
    assert not should_stop_early(progress, 4)
    assert not should_stop_early(progress, None)
