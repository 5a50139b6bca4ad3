"""What an evaluation writes: results.json, results.md, scores.parquet, grids, steps.png, and report.html to look at."""

import json
import math

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from pso_utils.evaluate import report
from pso_utils.evaluate.drawing import Images
from pso_utils.evaluate.plan import Plan
from pso_utils.evaluate.scoring import Scores
from pso_utils.rewards import statistics


GRID_PROMPTS = 8
CARD_IMAGES = 4  # of each prompt and model, on its card in the report


def without_nan(value):
    """For JSON, which has no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summarize(plan: Plan, images: Images, scores: Scores) -> list[dict]:
    """The tables' rows, one for each model and setting."""
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(plan.prompts))}
    prompts = np.array([numbers[prompt] for prompt in plan.prompts])
    rows = []
    for index, (model, setting) in enumerate(plan.rows):
        # the median, in which the first batch's warming up does not show
        seconds = float(np.median([images.seconds(model, setting, sample) for sample in plan.samples]))
        row = {"model": model.name, "steps": setting.label, "num_steps": setting.num_steps, "scores": {}}
        row |= {"seconds_per_image": seconds, "images_per_second": 1 / seconds}
        base = plan.rows.index((plan.models[0], setting))
        for measure, values in scores.items():
            score = statistics.summarize(values[index], prompts)
            if model.lora is not None:
                higher_is_better = measure.higher_is_better
                score |= statistics.compare(values[index], values[base], prompts, higher_is_better=higher_is_better)
            row["scores"][measure.name] = score
        rows.append(row)
    return rows


def image_lines(plan: Plan, images: Images, scores: Scores) -> list[dict]:
    """The lines of scores.parquet."""
    lines = []
    for row, (model, setting) in enumerate(plan.rows):
        for index, sample in enumerate(plan.samples):
            file = images.path(model, setting, sample).relative_to(plan.output_dir).as_posix()
            line = {"model": model.name, "steps": setting.label, **sample._asdict(), "file": file}
            lines.append(line | {measure.name: values[row, index].item() for measure, values in scores.items()})
    return lines


def prompt_means(plan: Plan, scores: Scores, *, num_prompts: int) -> dict[str, dict[str, dict[str, list[float]]]]:
    """steps -> model -> measure -> the mean of each prompt's images, for the first prompts; NaN if one failed."""
    table: dict = {setting.label: {} for setting in plan.settings}
    for row, (model, setting) in enumerate(plan.rows):
        table[setting.label][model.name] = {
            measure.name: values[row].reshape(-1, plan.images_per_prompt).mean(axis=1)[:num_prompts].tolist()
            for measure, values in scores.items()
        }
    return table


def pictures_of(plan: Plan, images: Images, prompt_index: int) -> dict[str, dict[str, list[Image.Image]]]:
    """steps -> model -> the first images of a prompt."""
    start = prompt_index * plan.images_per_prompt
    samples = plan.samples[start : start + min(plan.images_per_prompt, CARD_IMAGES)]
    return {s.label: {m.name: images.read(m, s, samples) for m in plan.models} for s in plan.settings}


def write_results(plan: Plan, images: Images, scores: Scores, *, header: dict, num_cards: int) -> str:
    """Writes everything to the output folder; returns the table."""
    folder, per_prompt = plan.output_dir, plan.images_per_prompt
    prompts = plan.prompts[::per_prompt]
    results = without_nan({
        **header,
        "num_prompts": len(prompts),
        "images_per_prompt": per_prompt,
        "measures": [measure._asdict() for measure in scores],
        "rows": summarize(plan, images, scores),
    })  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    table = report.markdown_table(results)
    (folder / "results.md").write_text(table, encoding="utf-8")
    lines = pyarrow.Table.from_pylist(without_nan(image_lines(plan, images, scores)))
    pyarrow.parquet.write_table(lines, folder / "scores.parquet")

    (folder / "grids").mkdir(exist_ok=True)
    for earlier in [*(folder / "grids").glob("steps-*.png"), folder / "steps.png"]:  # of other numbers of steps
        earlier.unlink(missing_ok=True)
    firsts, grids = plan.samples[::per_prompt][:GRID_PROMPTS], {}
    for setting in plan.settings:
        rows = {model.name: images.read(model, setting, firsts) for model in plan.models}
        grids[setting.label] = report.model_grid(rows, prompts[:GRID_PROMPTS])
        grids[setting.label].save(folder / "grids" / f"steps-{setting.label}.png")
    plot = report.steps_plot(results) if len(plan.settings) > 1 and scores else None
    if plot is not None:
        plot.save(folder / "steps.png")
    shown = prompts[:num_cards]
    cards = ((prompt, pictures_of(plan, images, index)) for index, prompt in enumerate(shown))
    means = without_nan(prompt_means(plan, scores, num_prompts=len(shown)))
    page = report.html_report(results, cards, means=means, grids=grids, plot=plot)
    (folder / "report.html").write_text(page, encoding="utf-8")
    return table
