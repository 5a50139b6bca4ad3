"""Signals: when they end a program, and by which exit code. In processes of their own, which signals may kill."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from types import FunctionType

import pytest
from accelerate import Accelerator

from pso_utils.run import interruption
from pso_utils.run.accelerator import PROCESS_TIMEOUT, one_line_errors
from pso_utils.run.interruption import signals


def exit_code(program: Callable[[], None]) -> int:
    """Of `program`, run in a fork; minus the number of the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            program()
            code = 0
        except SystemExit as stop:
            code = stop.code
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_a_program_at_once_unless_a_loop_reads_it(number):
    def at_once():
        with one_line_errors(__file__):
            os.kill(os.getpid(), number)
            time.sleep(60)

    def in_a_loop():
        with one_line_errors(__file__):
            accelerator = Accelerator(cpu=True)
            assert signals.agreed(accelerator) == 0
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # a launcher's echo
            assert signals.agreed(accelerator) == number
            signals.end_at_once()

    expected = 130 if number == signal.SIGINT else 143
    assert exit_code(at_once) == exit_code(in_a_loop) == expected


def test_another_signal_ends_a_loop_at_once(monkeypatch):
    monkeypatch.setattr(interruption, "ECHO_SECONDS", 0.01)

    def program():
        with one_line_errors(__file__):
            signals.agreed(Accelerator(cpu=True))
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    assert exit_code(program) == -signal.SIGTERM


def test_what_was_ignored_stays_ignored():
    def program():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        with one_line_errors(__file__):
            os.kill(os.getpid(), signal.SIGHUP)

    assert exit_code(program) == 0


def test_forked_workers_leave_signals_to_the_program():
    def program():
        with one_line_errors(__file__):
            assert exit_code(lambda: os.kill(os.getpid(), signal.SIGINT)) == 0

    assert exit_code(program) == 0


def test_an_error_of_a_collective_call_says_that_another_process_has_ended_or_stopped(capsys):
    def wait():
        raise RuntimeError("[gloo/unbound_buffer.cc:78] Timed out waiting 300000ms for recv operation to complete")

    minutes = PROCESS_TIMEOUT.total_seconds() / 60
    collective = FunctionType(wait.__code__, {"__name__": "torch.distributed.distributed_c10d"})
    for function, expected in ((collective, True), (wait, False)):
        with pytest.raises(RuntimeError, match="Timed out"), one_line_errors(__file__):
            function()
        assert (f"gave no sign for {minutes:g} minutes" in capsys.readouterr().err) == expected


def test_a_program_whose_launcher_is_gone_ends(monkeypatch):
    monkeypatch.setattr(interruption, "WATCH_SECONDS", 0.05)
    monkeypatch.setattr(interruption, "_is_launcher", lambda pid: True)
    read_end, write_end = os.pipe()

    def launcher():
        if os.fork() == 0:
            try:
                with one_line_errors(__file__):
                    os.write(write_end, b"running ")
                    time.sleep(60)
            except SystemExit as stop:
                os.write(write_end, str(stop.code).encode())
        else:
            time.sleep(0.2)

    exit_code(launcher)
    os.close(write_end)
    with open(read_end) as pipe:
        assert pipe.read() == "running 143"


@pytest.mark.parametrize(
    "words, expected",
    [
        (["/venv/bin/accelerate", "launch", "train.py"], True),
        (["accelerate.commands.launch", "train.py"], True),
        (["torchrun", "train.py"], True),
        (["accelerate launch train.py; nohup python train.py &"], False),  # a shell's
    ],
)
def test_a_launcher_is_known_by_its_command_line(words, expected):
    code = "print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-S", "-c", code, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()  # it runs
        assert interruption._is_launcher(process.pid) == expected
        process.communicate(b"\n")
    assert not interruption._is_launcher(process.pid)
