"""One run at a time in an output folder."""

import json
import multiprocessing
import os
import resource
import signal
import time

import pytest

from pso_utils.errors import UserError
from pso_utils.run import lock
from pso_utils.run.lock import locked


def write_lock(folder, *, age: float = 0, **owner):
    path = folder / "run.lock"
    path.write_text(json.dumps(owner) if owner else "")
    os.utime(path, (time.time() - age,) * 2)


@pytest.fixture
def other_process():
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    process.start()
    yield process
    process.kill()
    process.join()


def test_a_lock_is_of_one_run_and_is_gone_after_it(tmp_path):
    for _ in range(2):
        with locked(tmp_path):
            holder = json.loads((tmp_path / "run.lock").read_text())
            assert holder["pid"] == os.getpid() and holder["host"]
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("age", [0, 290])
def test_a_folder_in_use_is_one_line_with_host_and_process(tmp_path, other_process, age):
    owners = [{"host": "node7", "pid": 12}, {"host": lock.socket.gethostname(), "pid": other_process.pid}, {}]
    for owner in owners:  # elsewhere, here, half-written
        write_lock(tmp_path, age=age, **owner)
        with pytest.raises(UserError, match="in use") as error, locked(tmp_path):
            pass
        assert "\n" not in str(error.value) and "pass another --output_dir" in str(error.value)
        if owner:
            assert f"process {owner['pid']} on {owner['host']}" in str(error.value)
        assert (tmp_path / "run.lock").exists()


def test_a_stale_lock_is_named_and_taken_over(tmp_path, other_process, caplog):
    other_process.kill()
    other_process.join()
    for age, owner in [(301, {"host": "node7", "pid": 12}), (0, {"host": lock.socket.gethostname(), "pid": 2**40}),
                       (0, {"host": lock.socket.gethostname(), "pid": other_process.pid})]:  # fmt: skip
        write_lock(tmp_path, age=age, **owner)
        with locked(tmp_path):
            assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
        assert f"of process {owner['pid']} on {owner['host']} is stale" in caplog.text
        assert not (tmp_path / "run.lock").exists()


def test_a_disk_that_is_full_leaves_no_lock_of_nobodys(tmp_path):
    def fill_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with pytest.raises(OSError), locked(tmp_path):
            pass

    process = multiprocessing.get_context("fork").Process(target=fill_disk)
    process.start()
    process.join()
    assert process.exitcode == 0 and not list(tmp_path.iterdir())


def test_the_lock_is_touched_while_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.02)
    with locked(tmp_path):
        os.utime(tmp_path / "run.lock", (0, 0))
        deadline = time.monotonic() + 10
        while (tmp_path / "run.lock").stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / "run.lock").stat().st_mtime > 0
        write_lock(tmp_path, host="node7", pid=12)  # another run has taken it over
    assert json.loads((tmp_path / "run.lock").read_text())["host"] == "node7"
