"""Signals that ask a run to stop, and how it leaves."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from titan_fp8.runtime.preemption import PREEMPTED, SIGNALS, Preempted, StopSignals, leave


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.delenv("TITAN_FP8_PREEMPTED_FILE", raising=False)


@pytest.fixture
def stop_signals() -> Iterator[StopSignals]:
    with closing(StopSignals()) as signals:
        yield signals


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_is_remembered_and_ends_nothing(stop_signals: StopSignals, number: signal.Signals) -> None:
    assert not stop_signals.received
    for _ in range(2):
        os.kill(os.getpid(), number)
        assert stop_signals.received


def test_the_handlers_of_before_come_back() -> None:
    heard = []
    outer = {number: signal.signal(number, lambda number, _: heard.append(number)) for number in SIGNALS}
    try:
        signals = StopSignals()
        signals.close()
        signals.close()
        for number in SIGNALS:
            os.kill(os.getpid(), number)
        assert heard == list(SIGNALS)
        assert not signals.received
    finally:
        for number, handler in outer.items():
            signal.signal(number, handler)


def test_a_signal_that_was_ignored_is_ignored_again_afterwards() -> None:
    """`scripts/slurm_train.sh` starts trainers that ignore SIGUSR1 until they listen to it."""
    outer = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with closing(StopSignals()) as signals:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert signals.received
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, outer)


def test_outside_of_the_main_thread_nothing_is_installed() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    seen = []

    def in_a_thread() -> None:
        with closing(StopSignals()) as signals:
            seen.append((signals.received, [signal.getsignal(number) for number in SIGNALS]))

    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


def test_a_saved_run_leaves_with_a_code_of_its_own() -> None:
    assert PREEMPTED == 75
    with pytest.raises(Preempted) as end:
        leave(saved=True)
    assert end.value.code == 75


def test_a_run_without_a_checkpoint_leaves_as_a_failed_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Started again it would only begin anew."""
    monkeypatch.setenv("TITAN_FP8_PREEMPTED_FILE", str(tmp_path / "preempted"))
    with pytest.raises(Preempted) as end:
        leave(saved=False)
    assert end.value.code == 1
    assert not (tmp_path / "preempted").exists()


def test_under_torchrun_a_file_says_what_the_exit_code_cannot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any")
    monkeypatch.setenv("TITAN_FP8_PREEMPTED_FILE", str(tmp_path / "preempted"))
    for _ in range(2):  # the ranks of a node share the file
        with pytest.raises(Preempted) as end:
            leave(saved=True)
        assert end.value.code == 0
        assert (tmp_path / "preempted").exists()
