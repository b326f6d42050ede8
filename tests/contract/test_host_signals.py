"""Which signals stop `serve`, and that none of its handlers stay behind."""

from __future__ import annotations

import os
import signal
import time

import pytest

from dstack_sched.cli.host import STOP_SIGNALS, signals_interrupt


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_each_stop_signal_is_a_keyboard_interrupt_inside_and_only_inside(number: signal.Signals) -> None:
    outside = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup themselves
    try:
        before = [signal.getsignal(each) for each in STOP_SIGNALS]
        with pytest.raises(KeyboardInterrupt), signals_interrupt():
            os.kill(os.getpid(), number)
            time.sleep(5)
        assert [signal.getsignal(each) for each in STOP_SIGNALS] == before
    finally:
        signal.signal(signal.SIGHUP, outside)


def test_under_nohup_the_terminal_s_end_is_no_end() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_interrupt():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
