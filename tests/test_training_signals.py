"""Signals are noted at once and acted on between forward passes."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from stages.errors import StopRequested
from stages.training import signals
from stages.training.signals import Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_raised_at_the_next_check(number):
    heard = Signals()
    with heard.listening():
        heard.check()
        os.kill(os.getpid(), number)
        with pytest.raises(StopRequested) as caught:
            heard.check()
        assert caught.value.number == number
        with pytest.raises(StopRequested):
            heard.check()


def test_a_second_signal_acts_at_once():
    heard = Signals()
    with heard.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(StopRequested):
            os.kill(os.getpid(), signal.SIGINT)


def test_no_handler_of_the_users_swallows_it():
    assert not issubclass(StopRequested, Exception)


def test_handlers_are_put_back_and_old_signals_forgotten():
    heard = Signals()
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(StopRequested), heard.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        heard.check()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    heard.check()
    with heard.listening():
        heard.check()


def test_a_signal_after_the_last_check_does_not_stop_what_follows():
    heard = Signals()
    with heard.listening():
        os.kill(os.getpid(), signal.SIGTERM)
    heard.check()


def test_outside_the_main_thread_signals_are_left_alone():
    heard = Signals()
    before, seen = signal.getsignal(signal.SIGTERM), []

    def listen():
        with heard.listening():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_signal_that_may_not_stop_yet_is_told_once_and_stops_later():
    heard = Signals()
    may, told = [False], []
    with heard.listening(lambda: may[0], told.append):
        heard.check()
        assert told == []
        os.kill(os.getpid(), signal.SIGTERM)
        heard.check()
        heard.check()
        assert told == [signals.FINISHING]
        may[0] = True
        with pytest.raises(StopRequested):
            heard.check()


def test_an_echo_of_a_signal_is_no_second_one(monkeypatch):
    """Of several ranks each hears a Ctrl-C from the terminal, and again from whoever started them."""
    heard = Signals()
    clock = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: clock[0])
    with heard.listening(echo=True):
        os.kill(os.getpid(), signal.SIGINT)
        clock[0] += signals.ECHO_SECONDS
        os.kill(os.getpid(), signal.SIGINT)
        clock[0] += 0.1
        with pytest.raises(StopRequested):
            os.kill(os.getpid(), signal.SIGINT)
