"""Signals are noted at once and acted on between forward passes."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from stages.training import signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_raised_at_the_next_check(number):
    with signals.listening():
        signals.check()
        os.kill(os.getpid(), number)
        with pytest.raises(signals.StopRequested) as caught:
            signals.check()
        assert caught.value.number == number
        with pytest.raises(signals.StopRequested):
            signals.check()


def test_a_second_signal_acts_at_once():
    with signals.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(signals.StopRequested):
            os.kill(os.getpid(), signal.SIGINT)


def test_no_handler_of_the_users_swallows_it():
    assert not issubclass(signals.StopRequested, Exception)


def test_handlers_are_put_back_and_old_signals_forgotten():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(signals.StopRequested), signals.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        signals.check()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    signals.check()
    with signals.listening():
        signals.check()


def test_a_signal_after_the_last_check_does_not_stop_what_follows():
    with signals.listening():
        os.kill(os.getpid(), signal.SIGTERM)
    signals.check()


def test_outside_the_main_thread_signals_are_left_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def listen():
        with signals.listening():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_signal_that_may_not_stop_yet_is_told_once_and_stops_later():
    may, told = [False], []
    with signals.listening(lambda: may[0], told.append):
        signals.check()
        assert told == []
        os.kill(os.getpid(), signal.SIGTERM)
        signals.check()
        signals.check()
        assert told == [signals.FINISHING]
        may[0] = True
        with pytest.raises(signals.StopRequested):
            signals.check()


def test_an_echo_of_a_signal_is_no_second_one(monkeypatch):
    """Of several ranks each hears a Ctrl-C from the terminal, and again from whoever started them."""
    clock = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: clock[0])
    with signals.listening(echo=True):
        os.kill(os.getpid(), signal.SIGINT)
        clock[0] += signals.ECHO_SECONDS
        os.kill(os.getpid(), signal.SIGINT)
        clock[0] += 0.1
        with pytest.raises(signals.StopRequested):
            os.kill(os.getpid(), signal.SIGINT)
