"""The run's metrics: output_dir/metrics.jsonl and the tracker."""

import argparse
import json
import logging
import math
import os
import uuid
from collections.abc import Mapping
from pathlib import Path

from accelerate import Accelerator

from pso_utils.errors import first_line
from pso_utils.run.checkpoints import TrainingState


logger = logging.getLogger(__name__)

METRICS_NAME = "metrics.jsonl"


class MetricsLog:
    """Logs values to the trackers, and as a line of JSON each to `output_dir/metrics.jsonl`. What fails there is a
    warning, once."""

    def __init__(self, accelerator: Accelerator, output_dir):
        self.accelerator, self.path = accelerator, Path(output_dir, METRICS_NAME)
        self.failed: set[str] = set()

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers that are not finite are written as null, as JSON has no others."""
        try:
            self.accelerator.log(values, step=step)
        except Exception as error:  # a tracker's, each has its own: the run is worth more than its curves
            self._warn("the tracker", step, error)
        if not self.accelerator.is_main_process:
            return
        line = {"step": step}
        for name, value in values.items():
            value = value.item() if hasattr(value, "item") else value
            line[name] = None if isinstance(value, float) and not math.isfinite(value) else value
        before = "\n" if str(self.path) in self.failed else ""  # behind a line that was cut off
        try:
            with self.path.open("a") as file:
                file.write(f"{before}{json.dumps(line)}\n")
            self.failed.discard(str(self.path))
        except OSError as error:
            self._warn(str(self.path), step, error)

    def _warn(self, where: str, step: int, error: Exception):
        if where not in self.failed:
            self.failed.add(where)
            logger.warning(f"{where} failed at step {step}, the run goes on: {first_line(error)}", exc_info=True)

    def read(self) -> list[dict]:
        """The lines so far; one that was cut off when the run was killed is left out."""
        lines = []
        for text in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                lines.append(json.loads(text))
            except ValueError:
                continue
        return lines

    def rewind(self, step: int, *, validated_step: int) -> None:
        """Drops the lines after `step`, and the validations' after `validated_step`, so that a resumed run logs none
        twice. For the main process alone."""
        kept = [line for line in self.read() if line["step"] <= (validated_step if _is_validation(line) else step)]
        partial = self.path.with_name(METRICS_NAME + ".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(partial, self.path)


def _is_validation(line: dict) -> bool:
    return any(name.startswith("validation/") for name in line)


def start_logs(
    accelerator: Accelerator, args: argparse.Namespace, project: str, state: TrainingState, *, resumed: bool
) -> MetricsLog:
    """Starts the tracker and metrics.jsonl.

    A resumed run goes on where its checkpoint was taken: what was logged after `state` is dropped from
    metrics.jsonl and from TensorBoard, and wandb goes on with the run whose id `output_dir` keeps.
    """
    if args.report_to != "none":
        config = {key: value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
                  for key, value in vars(args).items() if key != "hub_token"}  # fmt: skip
        init_kwargs = {"tensorboard": {"purge_step": state.global_step + 1 if resumed else 0}}
        if args.report_to == "wandb" and accelerator.is_main_process:
            id_file = Path(args.output_dir, "wandb_run_id.txt")
            if not (resumed and id_file.exists()):
                id_file.write_text(uuid.uuid4().hex[:12])
            init_kwargs = {"wandb": {"id": id_file.read_text().strip(), "resume": "allow", "dir": args.output_dir}}
        accelerator.init_trackers(project, config=None if resumed else config, init_kwargs=init_kwargs)
    log = MetricsLog(accelerator, args.output_dir)
    if accelerator.is_main_process:
        if resumed:
            log.rewind(state.global_step, validated_step=state.validated_step)
        else:
            log.rewind(-1, validated_step=-1)
    return log
