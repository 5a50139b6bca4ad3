"""One run at a time in an output folder."""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pso_utils.errors import UserError


logger = logging.getLogger(__name__)

LOCK_NAME = "run.lock"
STALE_SECONDS = 300.0
HEARTBEAT_SECONDS = 30.0


@contextmanager
def locked(folder) -> Iterator[None]:
    """Holds `folder`/run.lock, with host and process, and touches it every half minute. One that is stale, because it
    was not touched for five minutes or its process is gone, is taken over with a line in the log.

    Raises:
        UserError: another run holds it.
    """
    path = Path(folder, LOCK_NAME)
    owner = {"host": socket.gethostname(), "pid": os.getpid()}
    try:
        _create(path, owner)
    except FileExistsError:
        holder, age = _read(path), _age(path)
        name = f"process {holder.get('pid')} on {holder.get('host')}"
        is_gone = holder.get("host") == owner["host"] and not _is_another_process(holder.get("pid"))
        if age < STALE_SECONDS and not is_gone:
            raise UserError(
                f"{folder} is in use by {name}, {path.name} was touched {age:.0f} s ago: pass another --output_dir, or"
                f" wait for that run (one that was killed on another machine is given up after {STALE_SECONDS:.0f} s)"
            ) from None
        reason = "the process is gone" if is_gone else f"it was not touched for {age:.0f} s"
        logger.warning(f"{path} of {name} is stale ({reason}) and is taken over")
        path.unlink(missing_ok=True)
        _create(path, owner)
    is_over = threading.Event()
    threading.Thread(target=_beat, args=(path, owner, is_over), daemon=True).start()
    try:
        yield
    finally:
        is_over.set()
        if _read(path) == owner:
            with suppress(OSError):  # the folder is gone, or read-only by now
                path.unlink()


def _create(path: Path, owner: dict):
    file = path.open("x")
    try:
        with file:
            json.dump(owner, file)
    except BaseException:  # a full disk above all: an empty lock, nobody's, would keep runs out until it is stale
        path.unlink()
        raise


def _read(path: Path) -> dict:
    """Its owner; empty for a file that is gone, half-written or something else."""
    try:
        owner = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _age(path: Path) -> float:
    with suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime
    return STALE_SECONDS


def _is_another_process(pid) -> bool:
    """Whether it runs; not this one, whose number an earlier container's run may have had."""
    if not isinstance(pid, int) or pid in (0, os.getpid()):
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:  # it is another user's
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def _beat(path: Path, owner: dict, is_over: threading.Event):
    while not is_over.wait(HEARTBEAT_SECONDS):
        if _read(path) != owner:
            return
        with suppress(OSError):  # a full or read-only disk, which the run itself will meet
            os.utime(path)
