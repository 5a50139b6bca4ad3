"""What rows are tuned to: how a model is measured for it, and how its curves of measures are compared."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import mean

import diffusers
import torch
import transformers

from demo.concept import ConceptBenchmark
from demo.measures import BATCH, KINDS, DrawingBenchmark, draw_prompts, grid, load_model, paired
from demo.recipe.common import ARTISTS, DEMO, STYLES
from demo.rewards import twemoji
from demo.tasks import WINNER
from pso_utils.evaluate.loras import Model, applied
from pso_utils.families import Family
from pso_utils.rewards import load_rewards, parse_rewards


CONCEPT = "snake"  # held out from all training
UNTUNED_MODELS = {"base": None, "teacher": DEMO / "emoji-teacher"}  # what tuned ones are compared with


def start_worker(threads: int):
    """Sets up a process that runs one part of the comparison at a time."""
    torch.set_num_threads(threads)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def scaled(count: int, args, at_least: int = 2) -> int:
    return max(at_least, round(count * args.fraction))


def finished(folder: Path, name: str) -> dict | None:
    """What a finished stage wrote last; without it the folder is emptied for a new start."""
    path = folder / name
    if path.exists():
        return json.loads(path.read_text())
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return None


# ---- Measuring ----

STEPS = (1, 2, 4)
SETTINGS = [f"{steps} {kind}" for steps in STEPS for kind in KINDS]
GOAL = "4 name"  # the share of these samples that are closest to the preferred artist's drawing, or to the ink's
SEED, PICTURED = 1_000_000, 11  # of the noise, as in demo.evaluate; images of a setting that are kept
REPORT_SEED, REPORT_TIMES = 2_000_000, 3  # of the noise that is reported where checkpoints are chosen by other noise
REWARD_MODELS = {"clip": [str(DEMO / "emoji-clip")]}
drawing_benchmark, concept_benchmark = cache(DrawingBenchmark), cache(ConceptBenchmark)


def draw_settings(
    args, family: Family, styles: tuple[str, ...], *, seed: int = SEED, times: int = 1
) -> Iterator[tuple]:
    """Yields (setting, prompts, images, their figures), drawn for the same prompts from the same noise by every
    model; of `times` as many images."""
    benchmark = drawing_benchmark(styles)
    concepts = benchmark.concepts(times * scaled(args.num_images, args, at_least=12))
    for setting in SETTINGS:
        steps, kind = setting.split()
        prompts = benchmark.prompts(kind, concepts)
        images = draw_prompts(family, prompts, steps=int(steps), seed=seed)
        yield setting, prompts, images, benchmark.figures(images, kind, concepts)


def measure_preference(args, family: Family) -> tuple[dict, list]:
    measures, pictures = {}, []
    for setting, prompts, images, figures in draw_settings(args, family, ARTISTS):
        kept = {key: figures[key] for key in ("distance", "sharpness", "diversity")}
        measures[setting] = {**kept, "share": figures[WINNER], "rewards": twemoji(images, prompts).tolist()}
        pictures.append(images[:PICTURED])
    return measures, pictures


def measure_reward(args, family: Family, *, reward: str, style: str) -> tuple[dict, list]:
    """Twice: from the noise that checkpoints are chosen by, and from other noise, with more images, as reported."""
    rewards = load_rewards(parse_rewards([reward], REWARD_MODELS.get(reward)), batch_size=BATCH)
    measures, pictures = {}, []
    for purpose, seed, times in (("selection", SEED, 1), ("report", REPORT_SEED, REPORT_TIMES)):
        measures[purpose] = {}
        for setting, prompts, images, figures in draw_settings(args, family, ARTISTS, seed=seed, times=times):
            kept = {key: figures[key] for key in ("distance", "sharpness", "diversity")}
            scores = rewards(images, prompts)[0].tolist()
            measures[purpose][setting] = {**kept, "share": figures[style], "rewards": scores}
            if purpose == "selection":
                pictures.append(images[:PICTURED])
    return measures, pictures


def measure_style(args, family: Family) -> tuple[dict, list]:
    measures, pictures = {}, []
    for setting, _, images, figures in draw_settings(args, family, STYLES):
        kept = {key: figures[f"ink {key}"] for key in ("distance", "sharpness")}
        measures[setting] = {**kept, "share": figures["ink"], "diversity": figures["diversity"]}
        pictures.append(images[:PICTURED])
    return measures, pictures


def measure_concept(args, family: Family) -> tuple[dict, list]:
    num_images = scaled(args.num_images, args, at_least=12)
    measured = concept_benchmark(CONCEPT).measure(family, num_images, seed=SEED)
    measures = {key: scores.tolist() for key, scores in measured.scores.items()}
    pictures = [measured.images[:PICTURED], measured.images[PICTURED:]]
    return measures | {"class diversity": measured.class_diversity}, pictures


def measure(args, task: str, weights: Path | None, picture: Path) -> dict:
    """Measures the distilled model with the LoRA or the denoiser in the folder `weights`, and draws `picture`."""
    is_denoiser = weights is not None and (weights / "config.json").exists()
    family = load_model(weights if is_denoiser else None)
    lora = None if is_denoiser or weights is None else str(weights)
    with applied(family.pipeline, Model("tuned", lora)):
        measures, pictures = TASKS[task].measure(args, family)
    grid(pictures, scale=1).save(picture)
    return measures


def untuned_folder(args, task: str, model: str) -> Path:
    return args.output_dir / f"{model}-{task}"


def measure_untuned(args, task: str, model: str) -> str:
    folder = untuned_folder(args, task, model)
    if finished(folder, "run.json") is None:
        measures = measure(args, task, UNTUNED_MODELS[model], folder / "step-0.png")
        (folder / "run.json").write_text(json.dumps(measures))
    return f"{model}, {task}"


def read_untuned(args, task: str) -> dict[str, dict]:
    """base and teacher -> what was measured."""
    return {model: json.loads((untuned_folder(args, task, model) / "run.json").read_text()) for model in UNTUNED_MODELS}


# ---- Comparing: a curve is a list of points, each a flat dict of numbers, the base first ----

GAP = 0.1  # of sharpness between base and teacher: below it distillation gave a setting nothing to lose


def settings_with_gap(base: dict, teacher: dict) -> list[str]:
    return [setting for setting in SETTINGS if base[setting]["sharpness"] - teacher[setting]["sharpness"] >= GAP]


def retention(tuned: float, base: float, teacher: float) -> float:
    """How much of what distillation gave is left: 1 at the base, 0 at the teacher."""
    return (tuned - teacher) / (base - teacher)


def summarize_preference(measures: dict, base: dict, teacher: dict) -> dict[str, float]:
    """Distances, sharpness and diversity are ratios to the base's; the reward's gain is in the base's standard
    deviations."""
    point = {}
    for setting in SETTINGS:
        point[f"distance {setting}"] = measures[setting]["distance"] / base[setting]["distance"]
        point[f"sharpness {setting}"] = measures[setting]["sharpness"] / base[setting]["sharpness"]
    for setting in settings_with_gap(base, teacher):
        values = (measured[setting]["sharpness"] for measured in (measures, base, teacher))
        point[f"retention {setting}"] = retention(*values)
    kept = [value for key, value in point.items() if key.startswith("retention")]
    point["retention"] = mean(kept) if kept else math.nan
    for steps in STEPS:
        point[f"distance {steps}"] = mean(point[f"distance {steps} {kind}"] for kind in KINDS)
    rewards = [torch.tensor(measured[GOAL]["rewards"]) for measured in (measures, base)]
    point |= {"share": measures[GOAL]["share"], "gain": paired(*rewards)["base_deviations"]}
    point["diversity"] = measures["4 class"]["diversity"] / base["4 class"]["diversity"]
    return point


def summarize_reward(measures: dict, base: dict, teacher: dict, *, goal: str, by_gain: bool) -> dict[str, float]:
    """As reported, with `selection`: the goal by the other noise, if that point holds the guards. The goal is the
    artist's share of the setting `goal`, or the reward's gain there."""
    points = {}
    for purpose, measured in measures.items():
        own, point = base[purpose], {}
        for setting in SETTINGS:
            for figure in ("distance", "sharpness"):
                point[f"{figure} {setting}"] = measured[setting][figure] / own[setting][figure]
        rewards = [torch.tensor(values[goal]["rewards"]) for values in (measured, own)]
        point["gain"] = paired(*rewards)["base_deviations"]
        point["share"] = point["gain"] if by_gain else measured[goal]["share"]
        point["diversity"] = measured["4 class"]["diversity"] / own["4 class"]["diversity"]
        points[purpose] = point
    chosen_by = points["selection"]
    held = reward_guards(chosen_by, steps=int(goal.split()[0]))
    return points["report"] | {"selection": chosen_by["share"] if held else -math.inf}


def reward_guards(point: dict, *, steps: int) -> bool:
    """The samples stay on the drawings, sharp and diverse, at the deployed number of steps and at fewer."""
    few = [f"{n} {kind}" for n in STEPS if n <= min(steps, 2) for kind in KINDS]
    kept = all(point[f"distance {setting}"] <= 1.15 and point[f"sharpness {setting}"] >= 0.85 for setting in few)
    return kept and (steps == 1 or preference_guards(point))


def preference_guards(point: dict) -> bool:
    """At the distilled number of steps the samples stay on the drawings, as sharp and as diverse as the base's."""
    kept = all(point[f"distance 4 {kind}"] <= 1.1 and 0.9 <= point[f"sharpness 4 {kind}"] <= 1.1 for kind in KINDS)
    return kept and point["diversity"] >= 0.8


def summarize_style(measures: dict, base: dict, teacher: dict) -> dict[str, float]:
    """Distances are to the ink drawings, sharpness is a ratio to their reconstructions', diversity to the base's."""
    point = {
        f"{key} {setting}": measures[setting][key] for setting in SETTINGS for key in ("share", "distance", "sharpness")
    }
    point["diversity"] = measures["4 class"]["diversity"] / base["4 class"]["diversity"]
    return point | {"share": measures[GOAL]["share"]}


def style_guards(point: dict) -> bool:
    kept = point[f"distance {GOAL}"] <= INK_DISTANCE and 0.85 <= point[f"sharpness {GOAL}"] <= 1.15
    return kept and point["diversity"] >= 0.8


def summarize_concept(measures: dict, base: dict, teacher: dict) -> dict[str, float]:
    """Gains are paired differences to the base in standard errors; the class's figures are ratios to the base's."""
    means = {key: mean(measures[key]) for key in ("image cosine", "closeness", "class clip")}
    gains = {key: paired(torch.tensor(measures[key]), torch.tensor(base[key]))["standard_errors"] for key in means}
    return {
        "share": means["image cosine"],
        "cosine gain": gains["image cosine"],
        "distance": -means["closeness"],
        "distance gain": gains["closeness"],
        "class clip": means["class clip"] / mean(base["class clip"]),
        "class diversity": measures["class diversity"] / base["class diversity"],
    }


def concept_guards(point: dict) -> bool:
    """The class prompt still draws the class, in as many ways."""
    return 0.95 <= point["class clip"] <= 1.05 and point["class diversity"] >= 0.8


@dataclass(frozen=True)
class Task:
    """What rows are tuned to and how they are judged.

    Attributes:
        measure: (args, family) -> what is measured of a model's samples, and rows of pictures.
        summarize: (of a model, of the base, of the teacher) -> a curve's point; its `share` is the goal.
        holds_guards: whether a point is still on the data.
        goal: what a point's `share` is called in the report.
        share: of the goal, at which rows are compared.
        about: of the goal and the guards, for the report.
        columns: of the report's table: a point's key to its title.
        panels: of the report's curves: a point's key to its title, lowest and highest value.
        pictures: file name to the rows of pictures that it shows side by side.
    """

    measure: Callable
    summarize: Callable
    holds_guards: Callable
    goal: str
    share: float
    about: str
    columns: dict[str, str]
    panels: dict[str, tuple[str, float, float]]
    pictures: dict[str, list[int]]


def picture_rows(steps: int) -> list[int]:
    return [SETTINGS.index(f"{steps} {kind}") for kind in KINDS]


# 1.5 times the distance at which the row ink-regression ends (0.436 to 0.443, three seeds). A sample that is farther
# from its ink drawing shows it less than the closest other one of its class does (0.68); sharp ones off the data are
# at 0.8, the base's at 0.75.
INK_DISTANCE = 0.66
TASKS = {
    "preference": Task(
        measure_preference,
        summarize_preference,
        preference_guards,
        "share",
        0.5,
        f"Share: {WINNER}'s share of 4-step samples of name prompts. Guards, at 4 steps, for name and class prompts: "
        "distance at most 1.1 times the base's, sharpness 0.9 to 1.1 times, diversity of class prompts at least 0.8 "
        "times. Distances are means over name and class prompts; they, sharpness and diversity are ratios to the "
        "base's.",
        {
            "retention": "retention",
            "distance 1": "distance, 1 step",
            "distance 2": "2 steps",
            "distance 4": "4 steps",
            "sharpness 4 name": "sharpness, 4 steps, name",
            "sharpness 4 class": "class",
            "diversity": "diversity",
            "gain": "reward gain, SD",
        },
        {
            "retention": ("retention", -0.5, 2.0),
            "distance 1": ("distance at 1 step / base's", 0.5, 3.0),
            "distance 4": ("distance at 4 steps / base's", 0.5, 3.0),
        },
        {f"preference_{steps}": picture_rows(steps) for steps in STEPS},
    ),
    "style": Task(
        measure_style,
        summarize_style,
        style_guards,
        "share",
        0.6,
        "Share: samples closest to the ink drawing among the artists' and the ink's, at 4 steps of name prompts. "
        f"Guards: distance to it at most {INK_DISTANCE}, sharpness 0.85 to 1.15 of its "
        "reconstruction's, diversity at least 0.8 times the base's.",
        {
            "distance 1 name": "distance, 1 step, name",
            "distance 4 name": "4 steps, name",
            "distance 4 class": "4 steps, class",
            "sharpness 1 name": "sharpness, 1 step, name",
            "sharpness 4 name": "4 steps, name",
            "sharpness 4 class": "4 steps, class",
            "diversity": "diversity / base's",
        },
        {
            "distance 4 name": ("distance, 4 steps, name", 0.0, 1.0),
            "sharpness 4 name": ("sharpness, 4 steps, name", 0.0, 1.5),
            "sharpness 1 name": ("sharpness, 1 step, name", 0.0, 1.5),
        },
        {f"style_{steps}": picture_rows(steps) for steps in STEPS},
    ),
    "concept": Task(
        measure_concept,
        summarize_concept,
        concept_guards,
        "cosine",
        0.85,
        f"Cosine: of CLIP's image embeddings to held-out views of the concept ({CONCEPT}). Guards: the class "
        "prompt's CLIP score within 5% of the base's, its diversity at least 0.8 times. Gains are paired, in standard "
        "errors.",
        {
            "cosine gain": "cosine gain",
            "distance": "pixel distance",
            "distance gain": "distance gain",
            "class clip": "class CLIP / base's",
            "class diversity": "class diversity / base's",
        },
        {
            "distance": ("pixel distance", 0.0, 1.0),
            "class clip": ("class CLIP / base's", 0.5, 1.1),
            "class diversity": ("class diversity / base's", 0.0, 1.5),
        },
        {"concept": [0, 1]},
    ),
}


REWARD_GUARDS = (
    "Guards, for name and class prompts: at 1 and 2 steps distance at most 1.15 times the base's, sharpness at least "
    "0.85 times; at 4 steps at most 1.1, and 0.9 to 1.1, and diversity of class prompts at least 0.8 times. "
    f"Checkpoints and rates are chosen on other noise than is reported, which has {REPORT_TIMES} times the images."
)


def reward_task(reward: str, style: str, *, goal: str, share: float, about: str, by_gain: bool = False) -> Task:
    """Online: `reward` is raised, `style` is the artist whose share is counted."""
    steps, kind = goal.split()
    return Task(
        partial(measure_reward, reward=reward, style=style),
        partial(summarize_reward, goal=goal, by_gain=by_gain),
        partial(reward_guards, steps=int(steps)),
        "gain" if by_gain else "share",
        share,
        f"{about} {REWARD_GUARDS}",
        {
            "images": "images scored",
            "gain": "reward gain, SD",
            f"distance {goal}": f"distance, {goal}",
            f"sharpness {goal}": f"sharpness, {goal}",
            "distance 1 name": "distance, 1 name",
            "distance 1 class": "1 class",
            "distance 4 class": "4 class",
            "sharpness 4 class": "sharpness, 4 class",
            "diversity": "diversity",
        },
        {
            f"distance {goal}": (f"distance, {goal} / base's", 0.5, 1.5),
            f"sharpness {goal}": (f"sharpness, {goal} / base's", 0.5, 1.5),
            "diversity": ("diversity / base's", 0.0, 1.5),
        },
        {f"online_{style}_{steps}_{kind}": picture_rows(int(steps))},
    )


TASKS |= {
    "online": reward_task(
        "demo.rewards:twemoji",
        "twemoji",
        goal="4 name",
        share=0.5,
        about="Reward: likeness to Twemoji's drawings. Share: Twemoji's of 4-step samples of name prompts.",
    ),
    "online-one-step": reward_task(
        "demo.rewards:twemoji",
        "twemoji",
        goal="1 name",
        share=0.5,
        about="The same, sampled and trained at one step. Share: of one-step samples. The guards are those at 1 step.",
    ),
    "online-clip": reward_task(
        "clip",
        "twemoji",
        goal="4 class",
        share=0.3,
        by_gain=True,
        about="Reward: CLIP's score, trained on class prompts alone. Gain: of 4-step samples of class prompts, in the "
        "base's standard deviations.",
    ),
    "online-held-out": reward_task(
        "demo.rewards:fluent",
        "fluent",
        goal="4 name",
        share=0.5,
        about="Reward: likeness to Fluent's drawings, on which nothing was tuned. Share: Fluent's of 4-step samples of "
        "name prompts.",
    ),
}


def at_share(curve: list[dict], share: float) -> dict | None:
    """The curve's point where the share is first reached, linear between the points beside it; None if it never is."""
    for before, after in zip(curve, curve[1:]):
        if before["share"] <= share <= after["share"] and before["share"] < after["share"]:
            weight = (share - before["share"]) / (after["share"] - before["share"])
            return {key: before[key] + weight * (after[key] - before[key]) for key in before}
    return None


def selection(task: Task, point: dict) -> float:
    """What points are chosen by: the share, if the guards hold, where the task has it from noise of its own by that."""
    return point.get("selection", point["share"] if task.holds_guards(point) else -math.inf)


def guarded_share(task: Task, curve: list[dict]) -> float:
    """The highest share among the trained points that hold the guards."""
    return max((selection(task, point) for point in curve[1:]), default=-math.inf)


def choose(task: Task, curves: dict[str, list[dict]]) -> str:
    """The learning rate of the highest share within the guards; where none has such a point, or several have the same
    share, the one of the best retention, if there is such a thing, at the matched share."""

    def key(learning_rate):
        matched = at_share(curves[learning_rate], task.share)
        kept = matched.get("retention", math.nan) if matched else math.nan
        return guarded_share(task, curves[learning_rate]), -math.inf if math.isnan(kept) else kept

    return max(curves, key=key)
