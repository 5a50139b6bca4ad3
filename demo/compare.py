"""Puts PSO beside its rivals on the demo: one artist preferred over the others, compared at equal gain.

    python -m demo.compare --output_dir outputs/compare

Every row of `ROWS` is trained at several learning rates with the first seed, its best rate again with the other seeds,
and measured along training at 1, 2 and 4 steps. `tables.md`, `curves.png` and `samples_*.png` say what came out. A run
that is finished is not run again: start the script again to go on, or with another --share to compare elsewhere.
"""

import argparse
import copy
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean

import diffusers
import torch
import transformers
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw, ImageFont

from demo.evaluate import draw, grid, paired
from demo.measures import KINDS, Yardstick, to_pixels
from demo.recipe.common import ARTISTS, DEMO, STYLES, load_drawings, set_learning_rate
from demo.recipe.distill import regression_step, solve_batch
from demo.recipe.teacher import DenoisingModel, noise_schedule, tokenize_kinds
from demo.rewards import twemoji
from demo.tasks import WINNER, preference_pairs
from pso_utils.mdp import convert_scheduler
from pso_utils.prompts import epoch_prompts, load_prompts
from pso_utils.sdxl import encode_images


# ---- Rows ----

MODEL = "--pretrained_model_name_or_path demo/emoji-turbo --resolution 32 --num_inference_steps 4 --vae_batch_size 64"
QUIET = "--num_validation_images 0 --report_to none"
OFFLINE = f"train_pso_lora_sdxl.py {MODEL} {QUIET} --train_batch_size 32 --center_crop --cache_latents"
PAIRS = f"{OFFLINE} --task preference --dataset_name {{tasks}}/preference.parquet"
OURS = ""  # the defaults of --task preference
ONLINE = (  # the README's command
    f"train_pso_online.py {MODEL} {QUIET} --prompts demo/prompts.txt --reward demo.rewards:twemoji --rank 32 "
    "--samples_per_prompt 8 --sample_batch_size 16 --sample_batches_per_epoch 4 --train_batch_size 64 "
    "--reward_batch_size 128 --lr_scheduler cosine --lr_warmup_steps 5"
)
ONLINE_STEPS, ONLINE_PROMPTS, SAMPLES_PER_PROMPT = 22, 64, 8  # an epoch, one optimizer step, is of 64 prompts
SOLUTIONS, SOLUTIONS_BATCH = 2048, 128  # each of a re-distillation's batches is of 2 x 128
WARMUP_STEPS, EMA_DECAY = 10, 0.95  # of the re-distilled student, as short as its training


@dataclass(frozen=True)
class Row:
    """One way of tuning. `command` is a training script with its flags; {tasks} and {prepared} stand for folders."""

    name: str
    about: str
    learning_rates: tuple[str, ...]  # the likeliest first
    steps: int
    command: str | None = None  # None: re-distillation, in this file
    prepare: Callable | None = None  # (args, seed, folder): what must be drawn before training, once a seed
    needs: str | None = None  # a row that must be trained before


def best_of_own_samples(args, seed: int, folder: Path):
    """The best, by the reward, of each prompt's K samples of the base: as many samples as the online row draws, for
    the same prompts, but all before training. Written as an image folder."""
    count = ONLINE_PROMPTS * scaled(ONLINE_STEPS, args)
    prompts = epoch_prompts(load_prompts("demo/prompts.txt"), seed, 0, count)
    repeated = [prompt for prompt in prompts for _ in range(SAMPLES_PER_PROMPT)]
    images = draw(load_pipeline(), repeated, 4, seed=100_000 * seed)
    best = twemoji(images, repeated).view(count, SAMPLES_PER_PROMPT).argmax(dim=1).tolist()
    lines = []
    for index, (prompt, place) in enumerate(zip(prompts, best)):
        images[index * SAMPLES_PER_PROMPT + place].save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": prompt}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))


def solutions_of_tuned_teacher(args, seed: int, folder: Path):
    """The solutions of the tuned teacher: its LoRA of the highest share in the row before, fused."""
    runs = [run for run in read_runs(args, "diffusion-teacher") if run["seed"] == args.seeds[0]]
    run = max(runs, key=lambda run: run["points"][-1]["cells"][GOAL]["share"])
    pipeline = load_pipeline(DEMO / "emoji-teacher")
    pipeline.load_lora_weights(run_folder(args, "diffusion-teacher", run["learning_rate"], run["seed"]))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    teacher, drawings = denoising_model(pipeline), load_drawings()
    input_ids = tokenize_kinds((pipeline.tokenizer, pipeline.tokenizer_2), drawings)
    targets = encode_images(pipeline, drawings.pixels[:, STYLES.index(WINNER)], 128)
    targets = targets[:, None].expand(-1, len(ARTISTS), -1, -1, -1)  # the tuning set, where distilling had all artists
    batches = scaled(SOLUTIONS // SOLUTIONS_BATCH, args, at_least=1)
    parts = [
        solve_batch(1000 * seed + index, teacher, drawings, targets, input_ids, *noise_schedule(), SOLUTIONS_BATCH)
        for index in range(batches)
    ]
    torch.save({key: torch.cat([part[key] for part in parts]) for key in parts[0]}, folder / "solutions.pt")
    (folder / "teacher.json").write_text(json.dumps({"seconds": run["points"][-1]["seconds"]}))


DIFFUSION_RATES = ("5e-4", "2e-4", "1e-3")
PAPER = "--weighting epsilon --beta 200 --target_anchor 0"
RELEASE = "--weighting epsilon --beta 5 --reference_weight 0.1 --prior_loss_weight 0.5"
ROWS = [
    Row("diffusion", "diffusion loss on the target images", DIFFUSION_RATES, 300, f"{PAIRS} --loss diffusion"),
    Row(
        "diffusion-teacher",
        "diffusion loss on the target images with the teacher, whose LoRA is then loaded on the distilled model",
        DIFFUSION_RATES,
        300,
        f"{PAIRS} --loss diffusion --distilled_unet demo/emoji-teacher",
    ),
    Row("sigmoid", f"PSO as in the paper ({PAPER})", ("1e-4", "3e-5", "3e-4"), 120, f"{PAIRS} --loss sigmoid {PAPER}"),
    Row("hinge", f"PSO as released ({RELEASE})", ("2e-4", "5e-4", "1e-3"), 160, f"{PAIRS} --loss hinge {RELEASE}"),
    Row("ours", "PSO with this project's defaults", ("3e-4", "1e-4", "6e-4"), 120, f"{PAIRS} {OURS}"),
    Row("online", "online PSO, the likeness as a reward", ("2.7e-3", "1.8e-3", "4e-3"), ONLINE_STEPS, ONLINE),
    Row(
        "best-of-k",
        "diffusion loss on the best of 8 samples of the base by the same reward, as many samples as online, drawn once",
        DIFFUSION_RATES,
        200,
        f"{OFFLINE} --rank 32 --task style --train_data_dir {{prepared}} --loss diffusion",
        prepare=best_of_own_samples,
    ),
    Row(
        "redistilled",
        "diffusion-teacher's LoRA fused into the teacher, to whose solutions the distilled UNet is regressed shortly",
        ("3e-4", "1e-4", "6e-4"),
        100,
        prepare=solutions_of_tuned_teacher,
        needs="diffusion-teacher",
    ),
]
ROWS = {row.name: row for row in ROWS}
NUM_CHECKPOINTS = 5  # of a run, the last one its result
ENDS = {"base": None, "teacher": DEMO / "emoji-teacher"}  # the scale's two ends


def scaled(count: int, args, at_least: int = 2) -> int:
    return max(at_least, round(count * args.fraction))


# ---- Training ----


def run_folder(args, row: str, learning_rate: str, seed: int) -> Path:
    return args.output_dir / row / f"lr{learning_rate}-seed{seed}"


def prepared_folder(args, row: str, seed: int) -> Path:
    return args.output_dir / row / f"prepared-seed{seed}"


def finished(folder: Path, name: str) -> dict | None:
    """What a finished stage wrote last; without it the folder is emptied for a new start."""
    path = folder / name
    if path.exists():
        return json.loads(path.read_text())
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return None


def train_by_script(args, row: Row, learning_rate: str, seed: int, folder: Path) -> list[dict]:
    """Runs the row's training script; returns the step, wall seconds and folder of each checkpoint's LoRA."""
    steps = scaled(row.steps, args)
    places = {"tasks": args.output_dir / "tasks", "prepared": prepared_folder(args, row.name, seed)}
    command = [sys.executable, *(token.format(**places) for token in row.command.split())]
    command += ["--learning_rate", learning_rate, "--seed", str(seed), "--max_train_steps", str(steps)]
    command += ["--checkpointing_steps", str(max(1, steps // NUM_CHECKPOINTS)), "--output_dir", str(folder)]
    start = time.time()
    with (folder / "log.txt").open("w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
        code = subprocess.run(command, cwd=DEMO.parent, env=environment, stdout=log, stderr=log).returncode
    if code:
        raise RuntimeError(f"{row.name}: the training failed, see {folder / 'log.txt'}")
    last = {"step": steps, "seconds": time.time() - start, "weights": "."}
    checkpoints = []
    for path in folder.glob("checkpoint-*/manifest.json"):
        manifest = json.loads(path.read_text())
        seconds = manifest["time_ns"] / 1e9 - start
        checkpoints.append({"step": manifest["global_step"], "seconds": seconds, "weights": path.parent.name})
    earlier = [checkpoint for checkpoint in checkpoints if checkpoint["step"] < steps]
    return [*sorted(earlier, key=lambda checkpoint: checkpoint["step"]), last]


def redistill(args, row: Row, learning_rate: str, seed: int, folder: Path) -> list[dict]:
    """A short regression of the distilled UNet, as a whole, onto the tuned teacher's solutions; saves its averages."""
    steps, checkpoints, start = scaled(row.steps, args), [], time.time()
    pipeline = load_pipeline()
    model = denoising_model(pipeline)
    model.unet.requires_grad_(True)
    ema = copy.deepcopy(model.unet).requires_grad_(False)
    solutions = torch.load(prepared_folder(args, row.name, seed) / "solutions.pt", weights_only=True)
    schedule = noise_schedule()
    optimizer = torch.optim.AdamW(model.unet.parameters(), lr=float(learning_rate), betas=(0.9, 0.99))
    torch.manual_seed(seed)
    for step in range(1, steps + 1):
        set_learning_rate(optimizer, float(learning_rate) * min(1.0, step / WARMUP_STEPS))
        regression_step(model, ema, optimizer, solutions, *schedule, EMA_DECAY)
        if step % max(1, steps // NUM_CHECKPOINTS) == 0 or step == steps:
            checkpoints.append({"step": step, "seconds": time.time() - start, "weights": f"checkpoint-{step}"})
            copy.deepcopy(ema).to(torch.float16).save_pretrained(folder / checkpoints[-1]["weights"])
    return checkpoints


def load_pipeline(weights: Path | None = None) -> StableDiffusionXLPipeline:
    """The distilled pipeline; `weights` is the folder of a LoRA to load or of a UNet to put in."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(DEMO / "emoji-turbo")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = convert_scheduler(pipeline.scheduler, "lcm")
    if weights is not None and (weights / "config.json").exists():
        pipeline.unet = UNet2DConditionModel.from_pretrained(weights)
    elif weights is not None:
        pipeline.load_lora_weights(weights)
    return pipeline


def denoising_model(pipeline: StableDiffusionXLPipeline) -> DenoisingModel:
    """The pipeline's text encoders and UNet as the recipe distils them, frozen."""
    model = DenoisingModel(len(pipeline.tokenizer))
    for part in ("text_encoder", "text_encoder_2", "unet"):
        getattr(model, part).load_state_dict(getattr(pipeline, part).state_dict())
    return model.requires_grad_(False)


# ---- Measuring ----

STEPS = (1, 2, 4)
CELLS = [f"{steps} {kind}" for steps in STEPS for kind in KINDS]
GOAL = "4 name"  # the preferred artist's share of these samples
SEED, PICTURED = 1_000_000, 11  # of the noise, as in demo.evaluate; images of a cell that are kept
yardstick = cache(Yardstick)


@torch.no_grad()
def measure(args, weights: Path | None, picture: Path) -> dict[str, dict]:
    """Measures samples of every cell, drawn for the same prompts from the same noise whatever the model."""
    pipeline, cells, pictures = load_pipeline(weights), {}, []
    concepts = yardstick().concepts(scaled(args.num_images, args, at_least=12))
    for cell in CELLS:
        steps, kind = cell.split()
        prompts = yardstick().prompts(kind, concepts)
        images = draw(pipeline, prompts, int(steps), SEED)
        measures = yardstick().measure(to_pixels(images), kind, concepts)
        cells[cell] = {
            "distance": measures.distance.mean().item(),
            "sharpness": measures.sharpness,
            "share": measures.shares[WINNER],
            "diversity": measures.diversity,
            "rewards": twemoji(images, prompts).tolist(),
        }
        pictures.append(images[:PICTURED])
    grid(pictures, scale=1).save(picture)
    return cells


def measure_end(args, name: str) -> str:
    folder = args.output_dir / name
    if finished(folder, "run.json") is None:
        (folder / "run.json").write_text(json.dumps(measure(args, ENDS[name], folder / "step-0.png")))
    return name


def prepare(args, name: str, seed: int) -> str:
    folder = prepared_folder(args, name, seed)
    if finished(folder, "seconds.json") is None:
        start = time.time()
        ROWS[name].prepare(args, seed, folder)
        earlier = folder / "teacher.json"
        seconds = json.loads(earlier.read_text())["seconds"] if earlier.exists() else 0.0
        (folder / "seconds.json").write_text(json.dumps({"seconds": seconds + time.time() - start}))
    return f"{name} prepared, seed {seed}"


def run(args, name: str, learning_rate: str, seed: int) -> str:
    """Trains and measures one row at one rate and seed; `run.json` is written last."""
    row, folder = ROWS[name], run_folder(args, name, learning_rate, seed)
    flags, path = [row.command, row.steps], folder / "run.json"
    if path.exists() and json.loads(path.read_text())["flags"] != flags:
        shutil.rmtree(folder)  # the row was changed since
    if not path.exists():
        points = finished(folder, "checkpoints.json")
        if points is None:
            points = (train_by_script if row.command else redistill)(args, row, learning_rate, seed, folder)
            (folder / "checkpoints.json").write_text(json.dumps(points))
        before = 0.0
        if row.prepare:
            before = json.loads((prepared_folder(args, name, seed) / "seconds.json").read_text())["seconds"]
        for point in points:
            point["seconds"] += before
            point["cells"] = measure(args, folder / point["weights"], folder / f"step-{point['step']}.png")
        result = {"learning_rate": learning_rate, "seed": seed, "flags": flags, "before": before, "points": points}
        path.write_text(json.dumps(result))
    return f"{name}, learning rate {learning_rate}, seed {seed}"


def read_runs(args, name: str) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((args.output_dir / name).glob("lr*/run.json"))]


# ---- Comparing: a curve is a list of points, each a flat dict of numbers, the base first ----

GAP = 0.1  # of sharpness between base and teacher: below it distillation gave a cell nothing to lose


def gap_cells(base: dict, teacher: dict) -> list[str]:
    return [cell for cell in CELLS if base[cell]["sharpness"] - teacher[cell]["sharpness"] >= GAP]


def retention(tuned: float, base: float, teacher: float) -> float:
    """How much of what distillation gave is left: 1 at the base, 0 at the teacher."""
    return (tuned - teacher) / (base - teacher)


def summarize(cells: dict, base: dict, teacher: dict, **numbers) -> dict[str, float]:
    """A point of a curve. Distances, sharpness and diversity are ratios to the base's; the reward's gain is in the
    base's standard deviations."""
    point = dict(numbers)
    for cell in CELLS:
        point[f"distance {cell}"] = cells[cell]["distance"] / base[cell]["distance"]
        point[f"sharpness {cell}"] = cells[cell]["sharpness"] / base[cell]["sharpness"]
    for cell in gap_cells(base, teacher):
        values = (measured[cell]["sharpness"] for measured in (cells, base, teacher))
        point[f"retention {cell}"] = retention(*values)
    kept = [value for key, value in point.items() if key.startswith("retention")]
    point["retention"] = mean(kept) if kept else math.nan
    for steps in STEPS:
        point[f"distance {steps}"] = mean(point[f"distance {steps} {kind}"] for kind in KINDS)
    rewards = [torch.tensor(measured[GOAL]["rewards"]) for measured in (cells, base)]
    point |= {"share": cells[GOAL]["share"], "gain": paired(*rewards)["base_deviations"]}
    point["diversity"] = cells["4 class"]["diversity"] / base["4 class"]["diversity"]
    return point


def holds_guards(point: dict) -> bool:
    """At the distilled number of steps the samples stay on the drawings, and as sharp as the base's."""
    return all(point[f"distance 4 {kind}"] <= 1.1 and 0.9 <= point[f"sharpness 4 {kind}"] <= 1.1 for kind in KINDS)


def at_share(curve: list[dict], share: float) -> dict | None:
    """The curve's point where the share is first reached, linear between the points beside it; None if it never is."""
    for before, after in zip(curve, curve[1:]):
        if before["share"] <= share <= after["share"] and before["share"] < after["share"]:
            weight = (share - before["share"]) / (after["share"] - before["share"])
            return {key: before[key] + weight * (after[key] - before[key]) for key in before}
    return None


def guarded_share(curve: list[dict]) -> float:
    """The highest share among the trained points that hold the guards."""
    return max((point["share"] for point in curve[1:] if holds_guards(point)), default=-math.inf)


def choose(curves: dict[str, list[dict]], share: float) -> str:
    """The learning rate of the highest share within the guards; where none has such a point, or several have the same
    share, the one of the best retention at the matched share."""

    def key(learning_rate):
        matched = at_share(curves[learning_rate], share)
        kept = matched["retention"] if matched else math.nan
        return guarded_share(curves[learning_rate]), -math.inf if math.isnan(kept) else kept

    return max(curves, key=key)


def read_ends(args) -> dict[str, dict]:
    return {end: json.loads((args.output_dir / end / "run.json").read_text()) for end in ENDS}


def read_curves(args, name: str) -> dict[tuple[str, int], list[dict]]:
    """The row's curves, by learning rate and seed."""
    ends, curves = read_ends(args), {}
    for trained in read_runs(args, name):
        curve = [summarize(ends["base"], **ends, step=0, seconds=trained["before"])]
        curve += [summarize(p["cells"], **ends, step=p["step"], seconds=p["seconds"]) for p in trained["points"]]
        curves[trained["learning_rate"], trained["seed"]] = curve
    return curves


def chosen_rate(args, name: str) -> str:
    curves = read_curves(args, name)
    rates = ROWS[name].learning_rates[: args.learning_rates]
    return choose({rate: curves[rate, args.seeds[0]] for rate in rates if (rate, args.seeds[0]) in curves}, args.share)


# ---- The report ----


def spread(values: list[float], digits: int = 2) -> str:
    """Mean and range."""
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return "–"
    text = f"{mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])


def gap_table(base: dict, teacher: dict) -> str:
    rows = []
    for cell in CELLS:
        values = [measured[cell][key] for key in ("sharpness", "distance") for measured in (base, teacher)]
        sharpness, distance = values[0] - values[1], values[2] - values[3]
        used = "yes" if cell in gap_cells(base, teacher) else ""
        rows.append([cell, *(f"{v:.3f}" for v in (*values[:2], sharpness, *values[2:], distance)), used])
    columns = [f"{key}, {what}" for key in ("sharpness", "distance") for what in ("base", "teacher", "gap")]
    return markdown(["steps, prompts", *columns, "counts"], rows)


def rates_table(args, curves: dict) -> str:
    rows = []
    for name in args.rows:
        for rate in sorted(ROWS[name].learning_rates, key=float):
            curve = curves[name].get((rate, args.seeds[0]))
            if curve:
                within, matched = guarded_share(curve), at_share(curve, args.share)
                values = [within if math.isfinite(within) else math.nan, max(point["share"] for point in curve)]
                values.append(matched["retention"] if matched else math.nan)
                chosen = "yes" if rate == chosen_rate(args, name) else ""
                rows.append([name, rate, f"{curve[-1]['step']:g}", *(spread([value]) for value in values), chosen])
    at = f"retention at {args.share}"
    return markdown(["row", "learning rate", "steps", "share within guards", "highest share", at, "chosen"], rows)


MATCHED = {
    "retention": "retention",
    "distance 1": "distance, 1 step",
    "distance 2": "2 steps",
    "distance 4": "4 steps",
    "sharpness 4 name": "sharpness, 4 steps, name",
    "sharpness 4 class": "class",
    "diversity": "diversity",
    "gain": "reward gain, SD",
}


def matched_table(args, chosen: dict, ends: dict[str, dict], columns: dict[str, str]) -> str:
    rows = [[name, "", "", *(spread([point[key]]) for key in columns), ""] for name, point in ends.items()]
    for name, curves in chosen.items():
        points = [point for curve in curves if (point := at_share(curve, args.share))]
        values = [spread([point[key] for point in points]) for key in columns]
        steps, seconds = (spread([point[key] for point in points], 0) for key in ("step", "seconds"))
        rows.append([name, f"{len(points)} of {len(curves)}", steps, *values, seconds])
    return markdown(["row", "reach it", "step", *columns.values(), "seconds"], rows)


COLORS = ["#1f77b4", "#aec7e8", "#d62728", "#ff9896", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b"]
PANELS = {  # measure: title, lowest, highest value
    "retention": ("retention", -0.5, 2.0),
    "distance 1": ("distance at 1 step / base's", 0.5, 3.0),
    "distance 4": ("distance at 4 steps / base's", 0.5, 3.0),
}


def draw_curves(chosen: dict) -> Image.Image:
    """The preferred artist's share against each of `PANELS`: a row's color, a line a seed; cut at the frame."""
    side, margin, ticks = 300, 48, 5
    font = ImageFont.load_default(size=13)
    picture = Image.new("RGB", (len(PANELS) * (side + margin) + 190, side + 2 * margin), "white")
    canvas = ImageDraw.Draw(picture)
    for index, (key, (title, low, high)) in enumerate(PANELS.items()):
        left, top = margin + index * (side + margin), margin
        canvas.rectangle((left, top, left + side, top + side), outline="black")
        canvas.text((left, top - 22), title, fill="black", font=font)
        canvas.text((left, top + side + 22), f"{WINNER}'s share at 4 steps", fill="black", font=font)
        for tick in range(ticks + 1):
            part = tick / ticks
            canvas.text((left + part * side - 8, top + side + 5), f"{part:.1f}", fill="black", font=font)
            canvas.text((left - 26, top + (1 - part) * side - 8), f"{low + part * (high - low):.1f}", "black", font)
        for color, curves in zip(COLORS, chosen.values()):
            for curve in curves:
                heights = [min(max((point[key] - low) / (high - low), 0), 1) for point in curve]
                places = [(left + p["share"] * side, top + (1 - y) * side) for p, y in zip(curve, heights)]
                canvas.line(places, fill=color, width=2)
                for x, y in places:
                    canvas.ellipse((x - 2, y - 2, x + 2, y + 2), fill=color)
    for index, (color, name) in enumerate(zip(COLORS, chosen)):
        x, y = picture.width - 178, margin + 20 * index
        canvas.ellipse((x, y + 4, x + 8, y + 12), fill=color)
        canvas.text((x + 14, y), name, fill="black", font=font)
    return picture


def draw_samples(args, chosen: dict, rates: dict, steps: int) -> Image.Image:
    """The same prompts and noise under every model: the tuned ones at their checkpoint closest to the matched share."""
    pictures = {name: args.output_dir / name / "step-0.png" for name in ENDS}
    for name, curves in chosen.items():
        point = min(curves[0][1:], key=lambda point: abs(point["share"] - args.share))
        pictures[name] = run_folder(args, name, rates[name], args.seeds[0]) / f"step-{point['step']}.png"
    size, label = 64, 140
    canvas = Image.new("RGB", (label + 2 * PICTURED * size, len(pictures) * size), "white")
    writer, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=13)
    for y, (name, path) in enumerate(pictures.items()):
        writer.text((4, y * size + size // 2 - 8), name, fill="black", font=font)
        for x, kind in enumerate(KINDS):
            with Image.open(path) as picture:
                place = CELLS.index(f"{steps} {kind}") * 32
                strip = picture.crop((0, place, picture.width, place + 32))
            strip = strip.resize((strip.width * 2, size), Image.Resampling.NEAREST)
            canvas.paste(strip, (label + x * PICTURED * size, y * size))
    return canvas


def report(args):
    """Writes the tables, curves and pictures of all finished runs."""
    base, teacher = read_ends(args).values()
    curves = {name: read_curves(args, name) for name in args.rows}
    args.rows = [name for name in args.rows if curves[name]]
    rates = {name: chosen_rate(args, name) for name in args.rows}
    chosen = {name: [c for (rate, _), c in curves[name].items() if rate == rates[name]] for name in args.rows}
    ends = {name: summarize(cells, base, teacher) for name, cells in read_ends(args).items()}
    share = f"base {base[GOAL]['share']:.2f}, teacher {teacher[GOAL]['share']:.2f}"
    text = [
        "## The distillation gap",
        gap_table(base, teacher),
        f"Retention is the mean over the cells that count, those with a gap in sharpness of at least {GAP}.",
        "## Learning rates",
        f"Share: {WINNER}'s share of 4-step samples of name prompts ({share}). Guards, at 4 steps, for name and class "
        "prompts: distance at most 1.1 times the base's, sharpness 0.9 to 1.1 times. Chosen: the highest share within "
        "the guards, or, where no checkpoint holds them, the best retention.",
        rates_table(args, curves),
        f"## At an equal share of {args.share}",
        "Linear between checkpoints; mean (lowest to highest) over seeds. Distances are means over name and class "
        "prompts; they, sharpness and diversity are ratios to the base's. Seconds: wall time of training on "
        f"{args.threads} thread{'s' if args.threads > 1 else ''}, with what must be drawn before it.",
        matched_table(args, chosen, ends, MATCHED),
        "By the number of steps and the kind of prompts:",
        *(
            matched_table(args, chosen, ends, {f"{what} {cell}": f"{what}, {cell}" for cell in cells})
            for what, cells in {"retention": gap_cells(base, teacher), "sharpness": CELLS, "distance": CELLS}.items()
            if cells
        ),
        "\n".join(f"- {name}: {ROWS[name].about}" for name in args.rows),
    ]
    (args.output_dir / "tables.md").write_text("\n\n".join(text) + "\n")
    draw_curves(chosen).save(args.output_dir / "curves.png")
    for steps in STEPS:
        draw_samples(args, chosen, rates, steps).save(args.output_dir / f"samples_{steps}.png")


# ---- The stages ----


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/compare"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="The first one tunes the rates.")
    parser.add_argument("--learning_rates", type=int, default=3, help="How many of each row's to try.")
    parser.add_argument("--jobs", type=int, default=2, help="Runs at once; each gets its part of the cores.")
    parser.add_argument("--num_images", type=int, default=110, help="For each number of steps and kind of prompt.")
    parser.add_argument("--share", type=float, default=0.5, help="The preferred artist's share to compare at.")
    parser.add_argument("--fraction", type=float, default=1.0, help="Of all step and image counts, for a trial.")
    parser.add_argument("--report_only", action="store_true", help="Only write the tables and pictures anew.")
    args = parser.parse_args(argv)
    for name in args.rows:
        if ROWS[name].needs not in (None, *args.rows):
            parser.error(f"--rows {name} needs {ROWS[name].needs}: add it")
    args.output_dir = args.output_dir.resolve()
    args.threads = max(1, (os.cpu_count() or 1) // args.jobs)
    counts, path = {"fraction": args.fraction, "num_images": args.num_images}, args.output_dir / "counts.json"
    if path.exists() and json.loads(path.read_text()) != counts:
        parser.error(f"--output_dir holds runs of {json.loads(path.read_text())}: pass the same, or another folder")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(counts))
    return args


def start_worker(threads: int):
    torch.set_num_threads(threads)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def in_parallel(pool, args, tasks: list[tuple]):
    """Runs tasks (function, *arguments), and says which are done."""
    futures = [pool.submit(function, args, *arguments) for function, *arguments in tasks]
    try:
        for future in as_completed(futures):
            print(time.strftime("%H:%M:%S"), future.result(), flush=True)
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)  # a failure ends the comparison once what runs is done
        raise


def train_and_measure(args):
    tasks_folder = args.output_dir / "tasks"
    tasks_folder.mkdir(exist_ok=True)
    preference_pairs().to_parquet(tasks_folder / "preference.parquet")
    first, *others = args.seeds
    context = multiprocessing.get_context("spawn")  # a fork would share torch's threads
    with ProcessPoolExecutor(args.jobs, context, start_worker, (args.threads,)) as pool:
        in_parallel(pool, args, [(measure_end, name) for name in ENDS])
        for later in (False, True):
            rows = [name for name in args.rows if bool(ROWS[name].needs) == later]
            in_parallel(pool, args, [(prepare, n, seed) for n in rows if ROWS[n].prepare for seed in args.seeds])
            rates = {name: ROWS[name].learning_rates[: args.learning_rates] for name in rows}
            in_parallel(pool, args, [(run, name, rate, first) for name in rows for rate in rates[name]])
            in_parallel(pool, args, [(run, n, chosen_rate(args, n), seed) for n in rows for seed in others])


def main(argv=None):
    args = parse_args(argv)
    if not args.report_only:
        train_and_measure(args)
    report(args)
    print((args.output_dir / "tables.md").read_text())


if __name__ == "__main__":
    main()
