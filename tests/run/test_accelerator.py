"""What is checked before a run of several processes starts."""

import json
import os
from datetime import timedelta
from types import SimpleNamespace

import pytest
from accelerate.utils import InitProcessGroupKwargs

from pso_utils.errors import UserError
from pso_utils.run import accelerator
from pso_utils.run.accelerator import at_end, check_shared_folder, make_accelerator


@pytest.fixture
def args(tmp_path, fresh_state) -> SimpleNamespace:
    """What `make_accelerator` reads of the flags."""
    values = {"output_dir": str(tmp_path / "out"), "logging_dir": "logs", "report_to": "none", "seed": 0}
    yield SimpleNamespace(**values | {"mixed_precision": "no", "allow_tf32": False})
    at_end.close()


def test_the_log_begins_with_device_and_processes_and_the_folder_is_the_runs_to_its_end(args, tmp_path, caplog):
    device = make_accelerator(args).device.type
    assert caplog.messages[0] == f"1 process on {device}, mixed precision no"
    with (tmp_path / "out" / "run.lock").open() as file:
        assert json.load(file)["pid"] == os.getpid()
    at_end.close()
    assert not (tmp_path / "out" / "run.lock").exists()


def test_a_run_asks_whether_all_nodes_share_its_folder_before_it_takes_it(args, tmp_path, monkeypatch):
    def refuse(accelerator, folder):
        raise UserError(f"{folder} is not shared")

    monkeypatch.setattr(accelerator, "check_shared_folder", refuse)
    with pytest.raises(UserError, match=f"{tmp_path / 'out'} is not shared"):
        make_accelerator(args)
    assert not (tmp_path / "out" / "run.lock").exists()


def test_a_stopped_process_is_waited_for_less_than_gloos_30_minutes(args, monkeypatch):
    make, handlers = accelerator.Accelerator, []

    def record(**settings):
        handlers.extend(settings.get("kwargs_handlers", []))
        return make(**settings)

    monkeypatch.setattr(accelerator, "Accelerator", record)
    make_accelerator(args)
    (timeout,) = [handler.timeout for handler in handlers if isinstance(handler, InitProcessGroupKwargs)]
    assert timeout == accelerator.PROCESS_TIMEOUT <= timedelta(minutes=15)


def test_a_folder_that_nodes_do_not_share_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(accelerator, "broadcast_object_list", list)

    def process(is_main_process, num_processes=2):
        settings = {"is_main_process": is_main_process, "num_processes": num_processes, "device": "cpu"}
        return SimpleNamespace(**settings, reduce=lambda tensor, reduction: tensor)

    check_shared_folder(process(True), str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    # a process on another node, in whose folder of this name the main one has written nothing
    with pytest.raises(UserError, match=f"--output_dir {tmp_path}: 1 of 2 processes do not see .* all nodes share"):
        check_shared_folder(process(False), str(tmp_path))
    check_shared_folder(process(False, num_processes=1), str(tmp_path))
