"""metrics.jsonl and the trackers."""

from types import SimpleNamespace

import torch

from pso_utils.run.logs import MetricsLog


def test_metrics_are_appended_and_rewound(tmp_path):
    tracked = []
    accelerator = SimpleNamespace(is_main_process=True, log=lambda values, step: tracked.append((step, values)))
    log = MetricsLog(accelerator, tmp_path)
    assert log.read() == []
    log.rewind(0, validated_step=-1)
    for step in range(1, 4):
        log(step, {"loss": torch.tensor(0.5) * step, "grad_norm": float("inf"), "epoch": 1})
        log(step, {"validation/reward_mean": 0.5})  # the run was taken up before those of steps 1 and 2
    assert tracked[-1] == (3, {"validation/reward_mean": 0.5}) and len(tracked) == 6
    with log.path.open("a") as file:
        file.write('{"step": 4, "lo')  # killed in the middle of a line
    assert [line["step"] for line in log.read()] == [1, 1, 2, 2, 3, 3]
    MetricsLog(accelerator, tmp_path).rewind(2, validated_step=0)
    log(3, {"loss": 0.0})
    assert log.read() == [
        {"step": 1, "loss": 0.5, "grad_norm": None, "epoch": 1},
        {"step": 2, "loss": 1.0, "grad_norm": None, "epoch": 1},
        {"step": 3, "loss": 0.0},
    ]


def test_a_tracker_and_a_file_that_fail_are_a_warning_each_and_lose_their_own_lines_alone(tmp_path, caplog):
    def track(values, step):
        if step in (1, 2):
            raise ConnectionError("no route to host")

    log = MetricsLog(SimpleNamespace(is_main_process=True, log=track), tmp_path)
    path = log.path
    log(1, {"loss": 1.0})
    log.path = tmp_path / "gone" / "metrics.jsonl"
    log(2, {"loss": 2.0})
    log(3, {"loss": 3.0})
    (tmp_path / "gone").mkdir()
    log.path.write_text('{"step": 2, "lo')  # the disk was full in the middle of a line
    log(4, {"loss": 4.0})
    log(5, {"loss": 5.0})
    assert [line["step"] for line in log.read()] == [4, 5] and path.read_text() == '{"step": 1, "loss": 1.0}\n'
    messages = [record.message for record in caplog.records]
    assert len(messages) == 2 and all(record.exc_info for record in caplog.records)
    assert "the tracker failed at step 1, the run goes on: ConnectionError: no route to host" in messages[0]
    assert "metrics.jsonl failed at step 2, the run goes on" in messages[1]
