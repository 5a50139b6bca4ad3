"""What the recipe's stages share: paths, the drawings as tensors, and a resumable training loop with a time budget."""

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset


DEMO = Path(__file__).resolve().parents[1]
DATA = DEMO / "emoji-data"
BUILD = DEMO / "build"  # the stages' checkpoints; not committed

ARTISTS = ("fluent", "noto", "twemoji")  # the styles that the UNet is trained to draw
STYLES = (*ARTISTS, "ink")  # the VAE knows the ink style too; the UNet has never seen it


@dataclass
class Drawings:
    """Every concept in every style, in the order of `STYLES`."""

    names: list[str]  # "red panda"
    classes: list[str]  # "animal"
    pixels: torch.Tensor  # [concepts, styles, 3, 32, 32] in [-1, 1]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def captions(self) -> list[str]:
        return [f"{name} {kind}" for name, kind in zip(self.names, self.classes)]

    def of_class(self, kind: str) -> torch.Tensor:
        """Indices of the concepts of one class."""
        return torch.tensor([i for i, other in enumerate(self.classes) if other == kind])


def load_drawings(split: str = "train") -> Drawings:
    """Reads `demo/emoji-data`; `split` is "train" or "held_out"."""
    files = {name: str(DATA / f"{name}.parquet") for name in ("train", "held_out")}
    rows = load_dataset("parquet", data_files=files, split=split).sort(["class", "name"])
    by_name = {}
    for name, kind, style, image in zip(rows["name"], rows["class"], rows["style"], rows["image"]):
        by_name.setdefault((name, kind), {})[style] = np.asarray(image.convert("RGB"))
    pixels = np.stack([[drawings[style] for style in STYLES] for drawings in by_name.values()])
    return Drawings(
        names=[name for name, _ in by_name],
        classes=[kind for _, kind in by_name],
        pixels=torch.from_numpy(pixels).permute(0, 1, 4, 2, 3).float().div(127.5).sub(1).contiguous(),
    )


def stage_arguments(description: str, steps: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, default=steps, help="Optimizer steps of the whole stage.")
    parser.add_argument(
        "--max_minutes", type=float, default=float("inf"), help="Stop after this long; run again to go on."
    )
    return parser.parse_args()


def learning_rate(peak: float, step: int, steps: int, warmup: int = 50, floor: float = 0.03) -> float:
    """Linear warm-up, constant for 30% of the run, then linear decay to `floor * peak`."""
    decay = 1 - max(0.0, step / steps - 0.3) / 0.7
    return peak * min(1.0, (step + 1) / warmup) * max(floor, decay)


def autocast() -> torch.autocast:
    """bfloat16 where the CPU is made for it; elsewhere it is emulated, five times slower than float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.backends.cpu.get_cpu_capability() == "AVX512")


def train(name: str, state: dict, update, steps: int, max_minutes: float, save_every: int = 100) -> bool:
    """Calls `update(step)`, which returns figures to print, until `steps` are done or the time is up.

    `state` maps names to modules and optimizers; it is stored in `demo/build/{name}.pt`, from where an interrupted
    stage goes on. Each step reseeds torch, so that a resumed run draws what an uninterrupted one would have drawn.
    Returns whether the stage is complete.
    """
    BUILD.mkdir(exist_ok=True)
    path = BUILD / f"{name}.pt"
    step = 0
    if path.exists():
        stored = torch.load(path, weights_only=True)
        step = stored.pop("step")
        for key, value in stored.items():
            state[key].load_state_dict(value)
        print(f"{name}: going on at step {step}", flush=True)

    def save():
        stored = {key: value.state_dict() for key, value in state.items()}
        torch.save({"step": step, **stored}, path.with_suffix(".partial"))
        os.replace(path.with_suffix(".partial"), path)

    start = time.monotonic()
    while step < steps and time.monotonic() - start < 60 * max_minutes:
        torch.manual_seed(step)
        figures = update(step)
        step += 1
        if step % 50 == 0:
            printed = " ".join(f"{key} {float(value.detach()):.4f}" for key, value in figures.items())
            print(f"{name} {step}/{steps} {time.monotonic() - start:.0f}s {printed}", flush=True)
        if step % save_every == 0:
            save()
    save()
    return step >= steps


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


@torch.no_grad()
def update_ema(ema: torch.nn.Module, model: torch.nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
