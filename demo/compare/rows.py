"""The rows of the comparison: how each is trained, and what was measured along its training."""

import copy
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import StableDiffusionXLPipeline

from demo.compare.tasks import CONCEPT, GOAL, TASKS, choose, finished, measure, read_untuned, scaled
from demo.measures import draw_prompts, load_model
from demo.recipe.common import ARTISTS, DEMO, STYLES, load_drawings, set_learning_rate
from demo.recipe.distill import regression_step, solve_batch
from demo.recipe.teacher import DenoisingModel, noise_schedule, tokenize_kinds
from demo.rewards import twemoji
from demo.tasks import WINNER, concept_views, write_image_folder
from pso_utils.data.prompts import epoch_prompts, load_prompts


MODEL = "--pretrained_model_name_or_path demo/emoji-turbo --resolution 32 --num_inference_steps 4 --vae_batch_size 64"
QUIET = "--num_validation_images 0 --report_to none"
OFFLINE = f"train_pso_lora_sdxl.py {MODEL} {QUIET} --train_batch_size 32 --center_crop --cache_latents --cache_prompts"
PAIRS = f"{OFFLINE} --task preference --dataset_name {{tasks}}/preference.parquet"
EVERY_LAYER = (
    "--rank 16 --lr_scheduler cosine --lr_warmup_steps 10 --lora_target_modules to_q to_k to_v to_out.0 proj_in "
    "proj_out ff.net.0.proj ff.net.2 conv1 conv2 conv_in conv_out time_emb_proj"
)
INK = f"{OFFLINE} --task style --train_data_dir {{tasks}}/ink --sample_batch_size 64 {EVERY_LAYER}"
REGRESSION = "--loss hinge --weighting x0 --beta 1 --reference_weight 0 --prior_loss_weight 0"  # the hinge is 1 + error
INSTANCE_PROMPT, CLASS_PROMPT = "sks animal", "animal"
CONCEPT_PROMPTS = f"--instance_prompt '{INSTANCE_PROMPT}' --class_prompt {CLASS_PROMPT}"
VIEWS = (
    f"{OFFLINE} --task concept --instance_data_dir {{tasks}}/concept/{CONCEPT} {CONCEPT_PROMPTS} "
    f"--sample_batch_size 20 {EVERY_LAYER}"
)
# A fixed number of samples, 8 of each of 64 prompts an epoch
ONLINE = (
    f"{MODEL} {QUIET} --rank 32 --samples_per_prompt 8 --sample_batch_size 16 "
    "--sample_batches_per_epoch 4 --train_batch_size 64 --reward_batch_size 128 --lr_scheduler cosine"
)
LIKENESS = "--prompts demo/prompts.txt --reward demo.rewards:twemoji"
ONLINE_EPOCHS, ONLINE_PROMPTS, SAMPLES_PER_PROMPT = 21, 64, 8
SOLUTIONS, SOLUTIONS_BATCH = 1024, 128  # each of a re-distillation's batches is of 2 x 128
CLASS_SAMPLES = 100
WARMUP_STEPS, EMA_DECAY = 10, 0.95  # of the re-distilled student, as short as its training


@dataclass(frozen=True)
class Row:
    """One way of tuning. `command` is a training script with its flags; {tasks} and {prepared} stand for folders."""

    name: str
    about: str
    learning_rates: tuple[str, ...]  # the likeliest first
    steps: int
    command: str | None = None  # None: re-distillation, in this file
    task: str = "preference"
    prepare: Callable | None = None  # (args, folder): what must be drawn before training, once, by the first seed
    needs: str | None = None  # a row that must be trained before
    images_per_step: float = 0.0  # samples drawn and scored for an optimizer step
    images_before: int = 0  # and before the first one


def best_of_own_samples(args, folder: Path):
    """The best, by the reward, of each prompt's K samples of the base: as many samples as the online row draws, for
    the same prompts, but all before training. Written as an image folder."""
    count = ONLINE_PROMPTS * scaled(ONLINE_EPOCHS, args)
    prompts = epoch_prompts(load_prompts(str(DEMO / "prompts.txt")), seed=args.seeds[0], epoch=0, count=count)
    repeated = [prompt for prompt in prompts for _ in range(SAMPLES_PER_PROMPT)]
    images = draw_prompts(load_model(), repeated, steps=4, seed=args.seeds[0])
    best = twemoji(images, repeated).view(count, SAMPLES_PER_PROMPT).argmax(dim=1).tolist()
    kept = [images[prompt * SAMPLES_PER_PROMPT + sample] for prompt, sample in enumerate(best)]
    write_image_folder(folder, {str(index): pair for index, pair in enumerate(zip(kept, prompts))})


def views_and_class_samples(args, folder: Path):
    """DreamBooth's prior preservation as an image folder: the views, and as many samples of the class prompt. The mean
    over its images is the mean of the instance loss and the prior loss of weight 1."""
    views, _ = concept_views(CONCEPT)
    samples = draw_prompts(load_model(), [CLASS_PROMPT] * scaled(CLASS_SAMPLES, args), steps=4, seed=args.seeds[0])
    images = [(sample, CLASS_PROMPT) for sample in samples]
    images += [(views[index % len(views)], INSTANCE_PROMPT) for index in range(len(samples))]
    write_image_folder(folder, {str(index): pair for index, pair in enumerate(images)})


def solutions_of_tuned_teacher(args, folder: Path):
    """The solutions of the tuned teacher: its LoRA of the highest share in the row before, fused."""
    runs = [run for run in read_runs(args, "diffusion-teacher") if run["seed"] == args.seeds[0]]
    run = max(runs, key=lambda run: run["points"][-1]["measures"][GOAL]["share"])
    family = load_model(DEMO / "emoji-teacher")
    pipeline = family.pipeline
    pipeline.load_lora_weights(run_folder(args, "diffusion-teacher", run["learning_rate"], run["seed"]))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    teacher, drawings = denoising_model(pipeline), load_drawings()
    input_ids = tokenize_kinds((pipeline.tokenizer, pipeline.tokenizer_2), drawings)
    targets = family.encode_images(drawings.pixels[:, STYLES.index(WINNER)])
    targets = targets[:, None].expand(-1, len(ARTISTS), -1, -1, -1)  # the tuning set, where distilling had all artists
    batches = scaled(SOLUTIONS // SOLUTIONS_BATCH, args, at_least=1)
    parts = [
        solve_batch(index, teacher, drawings, targets, input_ids, *noise_schedule(), SOLUTIONS_BATCH)
        for index in range(batches)
    ]
    torch.save({key: torch.cat([part[key] for part in parts]) for key in parts[0]}, folder / "solutions.pt")
    (folder / "teacher.json").write_text(json.dumps({"seconds": run["points"][-1]["seconds"]}))


DIFFUSION_RATES = ("2e-3", "1e-3", "4e-3")
INK_RATES = ("4e-3", "2e-3", "8e-3")
CONCEPT_RATES = ("1e-3", "3e-4", "3e-3")
PAPER = "--weighting epsilon --beta 200 --target_anchor 0"
RELEASE = "--weighting epsilon --beta 5 --reference_weight 0.1 --prior_loss_weight 0.5"
HINGE_VIEWS = f"{VIEWS} --loss hinge {RELEASE}"
ROWS = [
    Row("diffusion", "diffusion loss on the target images", DIFFUSION_RATES, 150, f"{PAIRS} --loss diffusion"),
    Row(
        "diffusion-teacher",
        "diffusion loss on the target images with the teacher, whose LoRA is then loaded on the distilled model",
        DIFFUSION_RATES,
        150,
        f"{PAIRS} --loss diffusion --distilled_unet demo/emoji-teacher",
    ),
    Row("sigmoid", f"PSO as in the paper ({PAPER})", ("3e-4", "1e-4", "1e-3"), 90, f"{PAIRS} --loss sigmoid {PAPER}"),
    Row("hinge", f"PSO as released ({RELEASE})", ("1e-3", "5e-4", "2e-3"), 90, f"{PAIRS} --loss hinge {RELEASE}"),
    Row("ours", "PSO with this project's defaults", ("2e-3", "1e-3", "4e-3"), 90, PAIRS),
    Row(
        "redistilled",
        "diffusion-teacher's LoRA fused into the teacher, to whose solutions the distilled UNet is regressed shortly",
        ("3e-4", "1e-4", "6e-4"),
        90,
        prepare=solutions_of_tuned_teacher,
        needs="diffusion-teacher",
    ),
    Row("ink-diffusion", "diffusion loss on the ink drawings", INK_RATES, 180, f"{INK} --loss diffusion", "style"),
    Row("ink-regression", "regression on them at the distilled steps", ("2e-3",), 120, f"{INK} {REGRESSION}", "style"),
    Row("ink-ours", "PSO with this project's defaults", INK_RATES, 150, INK, "style"),
    Row("concept-diffusion", "diffusion loss on the views", CONCEPT_RATES, 240, f"{VIEWS} --loss diffusion", "concept"),
    Row(
        "concept-dreambooth",
        "the same with DreamBooth's prior preservation: batches of 8, of views and as many samples of the class",
        CONCEPT_RATES,
        240,
        f"{OFFLINE} --task style --train_data_dir {{prepared}} --loss diffusion {EVERY_LAYER} --train_batch_size 8",
        "concept",
        prepare=views_and_class_samples,
    ),
    Row("concept-hinge", f"PSO as released ({RELEASE})", CONCEPT_RATES, 240, HINGE_VIEWS, "concept"),
    Row("concept-ours", "PSO with this project's defaults", ("3e-3", "1e-3", "5e-3"), 240, VIEWS, "concept"),
    Row(
        "online-best-of-k",
        "diffusion loss on the best of 8 samples of the base by the same reward, as many, all drawn before",
        DIFFUSION_RATES,
        120,
        f"{OFFLINE} --rank 32 --task style --train_data_dir {{prepared}} --loss diffusion",
        "online",
        prepare=best_of_own_samples,
        images_before=ONLINE_EPOCHS * ONLINE_PROMPTS * SAMPLES_PER_PROMPT,
    ),
]


class Form(NamedTuple):
    """A way of online tuning; an epoch is `steps` optimizer steps, of which each has all the epoch's pairs."""

    about: str
    learning_rates: tuple[str, ...]
    steps: int
    flags: str
    program: str = "train_pso_online.py"


TRANSITION = "--objective transition --lr_warmup_steps 5"
DENOISING = "--objective denoising --num_inner_epochs 3 --lr_warmup_steps 12"
MDP = f"{DENOISING} --weighting mdp"
RIVALS = "-m demo.compare.online_rivals"
FORMS = {
    "transition": Form("PSO by transitions, as in the paper", ("2.7e-3", "1.8e-3", "4e-3"), 1, TRANSITION),
    "x0": Form("PSO by denoising errors, weighted by x0", ("2e-3", "1.5e-3", "1e-3"), 3, DENOISING),
    "mdp": Form(
        "the same, weighted by mdp: all levels but the last",
        ("2e-3", "1.5e-3", "1e-3"),
        3,
        MDP,
    ),
    "group": Form(
        "the same of the two best and the two worst of a prompt in one sigmoid",
        ("2e-3", "1e-3", "4e-3"),
        3,
        f"{MDP} --form group --num_kept 2",
        RIVALS,
    ),
    "pull": Form(
        "the same of a pair, with a pull to the base's predictions",
        ("4e-3", "2e-3", "8e-3"),
        3,
        f"{MDP} --form group --base_anchor 4",
        RIVALS,
    ),
    "nft": Form(
        "DiffusionNFT at the distilled levels, of all samples",
        ("2e-3", "1e-3", "4e-3"),
        3,
        f"{MDP} --form nft --beta 1",
        RIVALS,
    ),
    "nft-pull": Form(
        "the same with a pull to the base's predictions",
        ("2e-3", "1e-3", "4e-3"),
        3,
        f"{MDP} --form nft --beta 1 --base_anchor 0.5",
        RIVALS,
    ),
}
# What is trained and sampled; the forms that it can be trained by
ONE_STEP = "--num_inference_steps 1"
ONLINE_TASKS = {
    "online": (LIKENESS, tuple(FORMS)),
    "online-one-step": (f"{LIKENESS} {ONE_STEP}", ("x0",)),
    "online-clip": (
        "--prompts demo/class_prompts.txt --reward clip --reward_model demo/emoji-clip",
        ("transition", "x0", "mdp"),
    ),
    "online-held-out": (
        "--prompts demo/prompts.txt --reward demo.rewards:fluent",
        ("transition", "x0", "mdp"),
    ),
}
ROWS += [
    Row(
        f"{task}-{name}",
        form.about,
        form.learning_rates,
        form.steps * ONLINE_EPOCHS,
        f"{form.program} {ONLINE} {flags} {form.flags}",
        task,
        images_per_step=ONLINE_PROMPTS * SAMPLES_PER_PROMPT / form.steps,
    )
    for task, (flags, names) in ONLINE_TASKS.items()
    for name, form in ((name, FORMS[name]) for name in names)
]
ROWS = {row.name: row for row in ROWS}
NUM_CHECKPOINTS = 3  # of a run, the last one its result


# ---- Training ----


def run_folder(args, row: str, learning_rate: str, seed: int) -> Path:
    return args.output_dir / row / f"lr{learning_rate}-seed{seed}"


def prepared_folder(args, row: str) -> Path:
    return args.output_dir / row / "prepared"


def children_cpu_seconds() -> float:
    """CPU time of this process's finished children, which other work on the machine hardly changes."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def train_by_script(args, row: Row, learning_rate: str, seed: int, folder: Path) -> list[dict]:
    """Runs the row's training script; returns the step, CPU seconds and folder of each checkpoint's LoRA."""
    steps = scaled(row.steps, args)
    folders = {"tasks": args.output_dir / "tasks", "prepared": prepared_folder(args, row.name)}
    command = [sys.executable, *(token.format(**folders) for token in shlex.split(row.command))]
    command += ["--learning_rate", learning_rate, "--seed", str(seed), "--max_train_steps", str(steps)]
    command += ["--checkpointing_steps", str(max(1, steps // NUM_CHECKPOINTS)), "--output_dir", str(folder)]
    command += ["--checkpointing_minutes", "1e6", "--checkpoints_total_limit", str(NUM_CHECKPOINTS + 1)]
    start, cpu_start = time.time(), children_cpu_seconds()
    with (folder / "log.txt").open("w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
        code = subprocess.run(command, cwd=DEMO.parent, env=environment, stdout=log, stderr=log).returncode
    if code:
        raise RuntimeError(f"{row.name}: the training failed, see {folder / 'log.txt'}")
    wall_seconds, cpu_seconds = time.time() - start, children_cpu_seconds() - cpu_start
    last = {"step": steps, "seconds": cpu_seconds, "weights": "."}
    checkpoints = []
    for path in folder.glob("checkpoint-*/manifest.json"):
        manifest = json.loads(path.read_text())
        seconds = (path.stat().st_mtime - start) / wall_seconds * cpu_seconds
        checkpoints.append({"step": manifest["global_step"], "seconds": seconds, "weights": path.parent.name})
    earlier = [checkpoint for checkpoint in checkpoints if checkpoint["step"] < steps]
    return [*sorted(earlier, key=lambda checkpoint: checkpoint["step"]), last]


def redistill(args, row: Row, learning_rate: str, seed: int, folder: Path) -> list[dict]:
    """A short regression of the distilled UNet, as a whole, onto the tuned teacher's solutions; saves its averages."""
    steps, checkpoints, start = scaled(row.steps, args), [], time.process_time()
    model = denoising_model(load_model().pipeline)
    model.unet.requires_grad_(True)
    ema = copy.deepcopy(model.unet).requires_grad_(False)
    solutions = torch.load(prepared_folder(args, row.name) / "solutions.pt", weights_only=True)
    schedule = noise_schedule()
    optimizer = torch.optim.AdamW(model.unet.parameters(), lr=float(learning_rate), betas=(0.9, 0.99))
    torch.manual_seed(seed)
    for step in range(1, steps + 1):
        set_learning_rate(optimizer, float(learning_rate) * min(1.0, step / WARMUP_STEPS))
        regression_step(model, ema, optimizer, solutions, *schedule, EMA_DECAY)
        if step % max(1, steps // NUM_CHECKPOINTS) == 0 or step == steps:
            checkpoints.append({"step": step, "seconds": time.process_time() - start, "weights": f"checkpoint-{step}"})
            copy.deepcopy(ema).to(torch.float16).save_pretrained(folder / checkpoints[-1]["weights"])
    return checkpoints


def denoising_model(pipeline: StableDiffusionXLPipeline) -> DenoisingModel:
    """The pipeline's text encoders and UNet as the recipe distils them, frozen."""
    model = DenoisingModel(len(pipeline.tokenizer))
    for part in ("text_encoder", "text_encoder_2", "unet"):
        getattr(model, part).load_state_dict(getattr(pipeline, part).state_dict())
    return model.requires_grad_(False)


def prepare(args, name: str) -> str:
    folder = prepared_folder(args, name)
    if finished(folder, "seconds.json") is None:
        start = time.process_time()
        ROWS[name].prepare(args, folder)
        earlier = folder / "teacher.json"
        seconds = json.loads(earlier.read_text())["seconds"] if earlier.exists() else 0.0
        (folder / "seconds.json").write_text(json.dumps({"seconds": seconds + time.process_time() - start}))
    return f"{name} prepared"


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
            before = json.loads((prepared_folder(args, name) / "seconds.json").read_text())["seconds"]
        for point in points:
            point["seconds"] += before
            point["measures"] = measure(args, row.task, folder / point["weights"], folder / f"step-{point['step']}.png")
        result = {"learning_rate": learning_rate, "seed": seed, "flags": flags, "before": before, "points": points}
        path.write_text(json.dumps(result))
    return f"{name}, learning rate {learning_rate}, seed {seed}"


def read_runs(args, name: str) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((args.output_dir / name).glob("lr*/run.json"))]


def read_curves(args, name: str) -> dict[tuple[str, int], list[dict]]:
    """The row's curves, by learning rate and seed."""
    task, curves = ROWS[name].task, {}
    untuned = read_untuned(args, task)
    for trained in read_runs(args, name):
        points = [{"measures": untuned["base"], "step": 0, "seconds": trained["before"]}, *trained["points"]]
        curves[trained["learning_rate"], trained["seed"]] = [
            {
                "step": point["step"],
                "seconds": point["seconds"],
                "images": ROWS[name].images_before + point["step"] * ROWS[name].images_per_step,
                **TASKS[task].summarize(point["measures"], **untuned),
            }
            for point in points
        ]
    return curves


def chosen_rate(args, name: str) -> str:
    curves, row = read_curves(args, name), ROWS[name]
    rates = [rate for rate in row.learning_rates[: args.learning_rates] if (rate, args.seeds[0]) in curves]
    return choose(TASKS[row.task], {rate: curves[rate, args.seeds[0]] for rate in rates})
