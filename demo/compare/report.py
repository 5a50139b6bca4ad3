"""The comparison's tables and pictures."""

import math
import re
import shutil
from functools import partial
from pathlib import Path
from statistics import mean

from PIL import Image, ImageDraw, ImageFont

from demo.compare.rows import ROWS, chosen_rate, read_curves, read_runs, run_folder
from demo.compare.tasks import (
    GAP,
    PICTURED,
    SETTINGS,
    TASKS,
    UNTUNED_MODELS,
    Task,
    at_share,
    guarded_share,
    read_untuned,
    selection,
    settings_with_gap,
    untuned_folder,
)


def spread(values: list[float], digits: int = 2) -> str:
    """Mean and range."""
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return "–"
    text = f"{mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def gap_table(base: dict, teacher: dict) -> str:
    rows = []
    for setting in SETTINGS:
        values = [measured[setting][key] for key in ("sharpness", "distance") for measured in (base, teacher)]
        sharpness, distance = values[0] - values[1], values[2] - values[3]
        used = "yes" if setting in settings_with_gap(base, teacher) else ""
        rows.append([setting, *(f"{v:.3f}" for v in (*values[:2], sharpness, *values[2:], distance)), used])
    columns = [f"{key}, {what}" for key in ("sharpness", "distance") for what in ("base", "teacher", "gap")]
    return markdown(["steps, prompts", *columns, "counts"], rows)


def rates_table(args, task: Task, curves: dict) -> str:
    rows = []
    for name, by_run in curves.items():
        for rate in sorted(ROWS[name].learning_rates, key=float):
            curve = by_run.get((rate, args.seeds[0]))
            if curve:
                within = guarded_share(task, curve)
                values = [within if math.isfinite(within) else math.nan, max(point["share"] for point in curve)]
                chosen = "yes" if rate == chosen_rate(args, name) else ""
                rows.append([name, rate, f"{curve[-1]['step']:g}", *(spread([value]) for value in values), chosen])
    return markdown(
        ["row", "learning rate", "steps", f"{task.goal} within guards", f"highest {task.goal}", "chosen"], rows
    )


def matched_table(chosen: dict, untuned: dict[str, dict], share: float, columns: dict[str, str]) -> str:
    """The untuned models' points, and the rows' curves where the share is reached."""
    titles = ["row", "reach it", "step", *columns.values(), "seconds"]
    rows = [[model, f"at {spread([point['share']])}", "", *(spread([point[key]]) for key in columns), ""]
            for model, point in untuned.items()]  # fmt: skip
    for name, curves in chosen.items():
        points = [point for curve in curves if (point := at_share(curve, share))]
        values = [spread([point[key] for point in points]) for key in columns]
        steps, seconds = (spread([point[key] for point in points], 0) for key in ("step", "seconds"))
        rows.append([name, f"{len(points)} of {len(curves)}", steps, *values, seconds])
    return markdown(titles, rows)


def guarded_table(task: Task, chosen: dict) -> str:
    """Each row's furthest checkpoint within the guards, seed by seed."""
    rows = []
    for name, curves in chosen.items():
        inside = [[point for point in curve[1:] if selection(task, point) > -math.inf] for curve in curves]
        best = [max(points, key=partial(selection, task)) for points in inside if points]
        values = [spread([point[key] for point in best]) for key in ("share", *task.columns)]
        steps, seconds = (spread([point[key] for point in best], 0) for key in ("step", "seconds"))
        rows.append([name, f"{len(best)} of {len(curves)}", steps, *values, seconds])
    return markdown(["row", "within guards", "step", task.goal, *task.columns.values(), "seconds"], rows)


COLORS = ["#1f77b4", "#aec7e8", "#d62728", "#ff9896", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b"]


def draw_curves(task: Task, chosen: dict) -> Image.Image:
    """The goal against each of the task's panels: a row's color, a line a seed; cut at the frame."""
    side, margin, ticks = 300, 48, 5
    font = ImageFont.load_default(size=13)
    picture = Image.new("RGB", (len(task.panels) * (side + margin) + 190, side + 2 * margin), "white")
    canvas = ImageDraw.Draw(picture)
    for index, (key, (title, low, high)) in enumerate(task.panels.items()):
        left, top = margin + index * (side + margin), margin
        canvas.rectangle((left, top, left + side, top + side), outline="black")
        canvas.text((left, top - 22), title, fill="black", font=font)
        canvas.text((left, top + side + 22), task.goal, fill="black", font=font)
        for tick in range(ticks + 1):
            part = tick / ticks
            canvas.text((left + part * side - 8, top + side + 5), f"{part:.1f}", fill="black", font=font)
            canvas.text((left - 26, top + (1 - part) * side - 8), f"{low + part * (high - low):.1f}", "black", font)
        for color, curves in zip(COLORS, chosen.values()):
            for curve in curves:
                heights = [min(max((point[key] - low) / (high - low), 0), 1) for point in curve]
                points = [(left + p["share"] * side, top + (1 - y) * side) for p, y in zip(curve, heights)]
                canvas.line(points, fill=color, width=2)
                for x, y in points:
                    canvas.ellipse((x - 2, y - 2, x + 2, y + 2), fill=color)
    for index, (color, name) in enumerate(zip(COLORS, chosen)):
        x, y = picture.width - 178, margin + 20 * index
        canvas.ellipse((x, y + 4, x + 8, y + 12), fill=color)
        canvas.text((x + 14, y), name, fill="black", font=font)
    return picture


def draw_samples(args, task: str, chosen: dict, rates: dict, rows: list[int]) -> Image.Image:
    """The same prompts and noise under every model: the tuned ones at their checkpoint closest to the matched share."""
    pictures = {model: untuned_folder(args, task, model) / "step-0.png" for model in UNTUNED_MODELS}
    for name, curves in chosen.items():
        point = min(curves[0][1:], key=lambda point: abs(point["share"] - TASKS[task].share))
        pictures[name] = run_folder(args, name, rates[name], args.seeds[0]) / f"step-{point['step']}.png"
    size, label = 64, 140
    canvas = Image.new("RGB", (label + len(rows) * PICTURED * size, len(pictures) * size), "white")
    writer, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=13)
    for y, (name, path) in enumerate(pictures.items()):
        writer.text((4, y * size + size // 2 - 8), name, fill="black", font=font)
        for x, row in enumerate(rows):
            with Image.open(path) as picture:
                strip = picture.crop((0, row * 32, picture.width, row * 32 + 32))
            strip = strip.resize((strip.width * 2, size), Image.Resampling.NEAREST)
            canvas.paste(strip, (label + x * PICTURED * size, y * size))
    return canvas.quantize(256)  # a third of the size


def report_task(args, task_name: str, names: list[str]) -> list[str]:
    """The task's part of the report; writes its pictures."""
    task, untuned = TASKS[task_name], read_untuned(args, task_name)
    curves = {name: read_curves(args, name) for name in names}
    rates = {name: chosen_rate(args, name) for name in names}
    chosen = {name: [c for (rate, _), c in curves[name].items() if rate == rates[name]] for name in names}
    untuned_points = {
        model: {"images": 0.0, **task.summarize(measures, **untuned)} for model, measures in untuned.items()
    }
    text = [f"### {task_name.capitalize()}", "\n".join(f"- *{name}*: {ROWS[name].about}" for name in names), task.about]
    if task_name == "preference":
        text += ["The distillation gap:", gap_table(**untuned)]
        text += [f"Retention is the mean over the cells that count, those with a gap in sharpness of at least {GAP}."]
    text += [
        f"At a {task.goal} of {task.share}, linear between checkpoints; mean (lowest to highest) over seeds. Seconds: "
        "CPU time of training, with what must be drawn before it, which is drawn once.",
        matched_table(chosen, untuned_points, task.share, task.columns),
        "The furthest checkpoint within the guards:",
        guarded_table(task, chosen),
        f"Learning rates, with the first seed. Chosen: the highest {task.goal} within the guards.",
        rates_table(args, task, curves),
    ]
    if task_name == "preference":
        text += [f"By the number of steps and the kind of prompts, at a {task.goal} of {task.share}:"]
        by_figure = {"retention": settings_with_gap(**untuned), "sharpness": SETTINGS, "distance": SETTINGS}
        for figure, settings in by_figure.items():
            if settings:
                columns = {f"{figure} {setting}": f"{figure}, {setting}" for setting in settings}
                text += [matched_table(chosen, untuned_points, task.share, columns)]
    draw_curves(task, chosen).save(args.output_dir / f"{task_name}_curves.png")
    text += ["A line a seed, a dot a checkpoint:", f"![Curves]({task_name}_curves.png)"]
    for name, rows in task.pictures.items():
        draw_samples(args, task_name, chosen, rates, rows).save(args.output_dir / f"{name}.png")
        text += [f"![Samples]({name}.png)"]
    return [*text, f"Samples of the checkpoint that is closest to a {task.goal} of {task.share}, on shared noise."]


BEGIN, END = "<!-- comparison: written by demo.compare -->", "<!-- end of comparison -->"


def has_marks(readme: Path) -> bool:
    text = readme.read_text() if readme.is_file() else ""
    return -1 < text.find(BEGIN) < text.find(END)


def insert(text: str, source: Path, readme: Path):
    """Puts the report between the marks of `readme`, and its pictures into the folder `comparison` beside it."""
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    folder = readme.parent / "comparison"
    folder.mkdir(exist_ok=True)
    for name in re.findall(r"\]\(([\w-]+\.png)\)", text):
        shutil.copyfile(source / name, folder / name)
        text = text.replace(f"]({name})", f"]({folder.name}/{name})")
    readme.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")


def report(args):
    """Writes the tables, curves and pictures of all finished runs."""
    parts = []
    for task in TASKS:
        names = [name for name in args.rows if ROWS[name].task == task and read_runs(args, name)]
        if names:
            parts += report_task(args, task, names)
    text = "\n\n".join(parts) + "\n"
    (args.output_dir / "tables.md").write_text(text)
    if args.readme:
        insert(text, args.output_dir, args.readme)
