"""What is checked before a run of several processes starts."""

from types import SimpleNamespace

import pytest

from pso_utils.errors import UserError
from pso_utils.run import accelerator
from pso_utils.run.accelerator import check_shared_folder


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
