"""Signals. A program that is told to stop ends with one line and the exit code 143, or 130 for SIGINT; a run that is in
its loop writes a checkpoint first (`Checkpoints.stop_if_interrupted`)."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator


SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)
ECHO_SECONDS = 1.0  # a launcher passes on what its processes got themselves, from the terminal or the batch system
LAUNCHERS = {"accelerate", "accelerate-launch", "accelerate.commands.launch", "torchrun", "torch.distributed.run"}
WATCH_SECONDS = 1.0


class Interrupted(BaseException):
    """A signal ends the program; no Exception, so that nobody takes it for an error of theirs."""

    def __init__(self, number: int, outcome: str = ""):
        super().__init__(f"stopped by {signal.Signals(number).name}{outcome}")
        self.exit_code = 130 if number == signal.SIGINT else 143


class _Signals:
    """The signals of this process, which has one program. The first one ends it at once or, where a loop reads it
    (`agreed`), at the loop's next step; another one ends it at once, whatever is being written."""

    def __init__(self):
        self.received, self._received_at, self._is_deferred, self._pid = 0, 0.0, False, os.getpid()

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Takes over the signals that are not ignored (as `nohup` ignores SIGHUP), and watches over a launcher."""
        self.__init__()
        # Python lets the main thread alone set handlers
        is_main_thread = threading.current_thread() is threading.main_thread()
        numbers = [n for n in SIGNALS if is_main_thread and signal.getsignal(n) != signal.SIG_IGN]
        earlier = {number: signal.signal(number, self._receive) for number in numbers}
        is_over, parent = threading.Event(), os.getppid()
        if signal.SIGTERM in earlier and _is_launcher(parent):
            threading.Thread(target=self._watch, args=(parent, is_over), daemon=True).start()
        try:
            yield
        finally:
            is_over.set()
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def agreed(self, accelerator: Accelerator) -> int:
        """The signal that came to any process, or 0; all processes call it, and it is the same on all of them. From
        here on signals wait for the next call, until `end_at_once`."""
        self._is_deferred = True
        if accelerator.num_processes == 1:
            return self.received
        return int(accelerator.gather(torch.tensor([self.received], device=accelerator.device)).max())

    def end_at_once(self):
        """The loop is over, and nothing is lost any more."""
        self._is_deferred = False
        if self.received:
            raise Interrupted(self.received)

    def _receive(self, number: int, frame):
        if os.getpid() != self._pid:  # a process that this one forked, and that it will end itself
            return
        if self.received:
            if time.monotonic() - self._received_at > ECHO_SECONDS:
                signal.signal(number, signal.SIG_DFL)
                os.kill(self._pid, number)
            return
        self.received, self._received_at = number, time.monotonic()
        if not self._is_deferred:
            raise Interrupted(number)
        if is_first_process():  # no print: it may be what the signal has interrupted
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: stopping at the next step; another one stops at once\n".encode())

    def _watch(self, parent: int, is_over: threading.Event):
        """`accelerate launch` passes no signal to its only process, which would train on without it."""
        while not is_over.wait(WATCH_SECONDS):
            if os.getppid() != parent:
                if not self.received:
                    os.kill(self._pid, signal.SIGTERM)
                return


signals = _Signals()


def is_first_process() -> bool:
    """Whether this process speaks for all; can be asked before there is an accelerator."""
    return os.environ.get("RANK", "0") == "0"


def _is_launcher(pid: int) -> bool:
    try:
        words = os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).split("\0")
    except OSError:  # not a Linux
        return False
    return any(Path(word).name in LAUNCHERS for word in words)
