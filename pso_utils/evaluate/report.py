"""What an evaluation shows: a Markdown table, grids, a plot against steps, and one HTML page that needs no network.

Everything is made from `results`, as the evaluation writes it to results.json, and from the images.
"""

import base64
import html
import io
import json
import math
from collections.abc import Iterable, Sequence
from importlib.resources import files
from string import Template

from PIL import Image, ImageDraw, ImageFont

from pso_utils.run.grids import image_grid, shorten


COLORS = ["#5f6368", "#1a73e8", "#d93025", "#188038", "#e37400", "#9334e6", "#12858d", "#b31412"]
PANEL_SIZE = (810, 550)  # of a measure in the plot
TIMINGS = {"images_per_second": "images/s", "seconds_per_image": "s/image"}


# ---- Numbers ----


def number(value: float | None, error: float | None = None, *, sign: bool = False) -> str:
    """A number with as many decimals as its error has two digits, or four digits; a dash for none."""
    if value is None or math.isnan(value):
        return "–"
    if error and math.isfinite(error):
        decimals = min(max(1 - math.floor(math.log10(error)), 0), 6)
        return f"{value:{'+' if sign else ''}.{decimals}f}"
    return f"{value:{'+' if sign else ''}.4g}" if value else "0"


def score_texts(score: dict) -> tuple[str, str, str, str]:
    """A score's mean, its error, and for a LoRA the gain over the base with its interval, and the wins."""
    error, own_error = score["standard_error"], score.get("difference_standard_error")
    mean, error = number(score["mean"], error), "" if error is None else f" ± {number(error, error)}"
    if "difference" not in score:
        return mean, error, "", ""
    values = [score["difference"], *score["interval"]]
    gain, low, high = (number(value, own_error, sign=True) for value in values)
    wins = "–" if score["win_rate"] is None else f"{100 * score['win_rate']:.0f}%"
    return mean, error, f"{gain} [{low}, {high}]", wins


def labels_of(results: dict) -> dict[str, str]:
    """Measure -> its heading: of `module:function` the function, where that is enough to tell them apart; with an arrow
    down where lower is better."""
    names = {measure["name"]: measure["name"].rpartition(":")[2] for measure in results["measures"]}
    labels = {name: short if list(names.values()).count(short) == 1 else name for name, short in names.items()}
    return {m["name"]: labels[m["name"]] + ("" if m["higher_is_better"] else " ↓") for m in results["measures"]}


def steps_label(steps: str) -> str:
    return "1 step" if steps == "1" else f"{steps} steps" if steps.isdigit() else f"timesteps {steps}"


def models_of(results: dict) -> list[str]:
    return list(dict.fromkeys(row["model"] for row in results["rows"]))


def notes(results: dict) -> list[str]:
    """What a reader of the numbers must know, failures first."""
    lines, labels = [], labels_of(results)
    for measure in results["measures"]:
        rows = {f"{row['model']}, {steps_label(row['steps'])}": row["scores"] for row in results["rows"]}
        scores = {row: by_name[measure["name"]] for row, by_name in rows.items()}
        failed = {row: score["failed"] for row, score in scores.items() if score["failed"]}
        if failed and measure["kind"] != "data":  # of the data's, a single image has no diversity: no failure
            total = sum(score["count"] + score["failed"] for score in scores.values())
            lines.append(
                f"{labels[measure['name']]} failed on {sum(failed.values())} of {total} images "
                f"({'; '.join(f'{row}: {count}' for row, count in failed.items())}): they are left out, in gains and "
                "wins with their partners."
            )
    counts = f"Prompts: {results['num_prompts']}, images of each: {results['images_per_prompt']}"
    text = [f"{counts}; every model draws from the same noise."]
    if labels:
        text.append(
            "Mean ± standard error over prompts; gain: the mean difference to the base from the same noise, with its "
            "95% bootstrap interval over prompts; wins: the share of images that score better than the base's, a tie "
            "counting half."
        )
    if not all(measure["higher_is_better"] for measure in results["measures"]):
        text.append("↓: lower is better.")
    return [*lines, " ".join([*text, "Time: drawing and decoding on one process, its median."])]


# ---- Markdown ----


def markdown_table(results: dict) -> str:
    labels, header, lines = labels_of(results), ["model", "steps"], []
    for label in labels.values():
        header += [label, "gain", "wins"]
    for row in results["rows"]:
        line = [row["model"], row["steps"]]
        for name in labels:
            mean, error, gain, wins = score_texts(row["scores"][name])
            line += [mean + error, gain, wins]
        lines.append(line + [f"{row[key]:.3g}" for key in TIMINGS])
    header += TIMINGS.values()
    # a "|" in the name of one's own reward would end its column
    table = [[text.replace("|", "&#124;") for text in line] for line in [header, ["---"] * len(header), *lines]]
    lines = [f"| {' | '.join(line)} |" for line in table]
    return "\n".join([*lines, "", *(f"- {line}" for line in notes(results)), ""])


# ---- Pictures ----


def model_grid(rows: dict[str, Sequence[Image.Image]], prompts: Sequence[str]) -> Image.Image:
    """Rows: models; columns: prompts. Images of one column are drawn from the same noise."""
    gap, margin, font = 4, 8, ImageFont.load_default(size=13)
    grid = image_grid([image for row in rows.values() for image in row], len(prompts), gap=gap, largest=256)
    width, height = (grid.width + gap) // len(prompts), (grid.height + gap) // len(rows)
    left, top = 2 * margin + min(180, max(int(font.getlength(name)) for name in rows)), margin + 18
    picture = Image.new("RGB", (left + grid.width + gap, top + grid.height + margin), "white")
    picture.paste(grid, (left, top))
    draw = ImageDraw.Draw(picture)
    for column, prompt in enumerate(prompts):
        caption = shorten(prompt or "(no prompt)", width - gap, font)
        draw.text((left + column * width, margin), caption, fill="dimgray", font=font)
    for row, name in enumerate(rows):
        draw.text((margin, top + row * height + height // 2 - 8), shorten(name, 180, font), fill="black", font=font)
    return picture


def ticks(low: float, high: float, most: int = 6) -> list[tuple[float, str]]:
    """At most `most` round numbers between low and high, with their texts."""
    power = 10 ** math.floor(math.log10((high - low) / most))
    step = next(power * factor for factor in (1, 2, 5, 10) if (high - low) / (power * factor) <= most)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    count = range(math.ceil(low / step), math.floor(high / step) + 1)
    return [(index * step, f"{index * step:.{decimals}f}") for index in count]


def steps_plot(results: dict) -> Image.Image:
    """A panel for each measure: its mean against the number of steps, a line for each model, bars of one standard
    error; drawn at twice the size that it is shown at."""
    models, labels = models_of(results), labels_of(results)
    columns, (width, height), line = min(3, len(labels)), PANEL_SIZE, 40
    legend = -(-len(labels) // columns) * height
    picture = Image.new("RGB", (columns * width, legend + len(models) * line + 10), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=24)
    for index, (name, label) in enumerate(labels.items()):
        scores = {(row["model"], row["steps"]): row["scores"][name] for row in results["rows"]}
        title = label.replace(" ↓", " (lower is better)")  # Pillow's font has no arrows
        _draw_panel(draw, (index % columns * width, index // columns * height), title, scores, font)
    for index, model in enumerate(models):
        y = legend + index * line
        draw.ellipse((150, y + 6, 168, y + 24), fill=COLORS[index % len(COLORS)])
        draw.text((178, y), shorten(model, picture.width - 200, font), fill="black", font=font)
    return picture


def _draw_panel(draw: ImageDraw.ImageDraw, corner: tuple[int, int], title: str, scores: dict, font):
    """One measure's panel, `PANEL_SIZE` from its upper left corner; `scores` by (model, steps)."""
    left, top, width, height, gray = corner[0] + 150, corner[1] + 70, 620, 400, "#5f6368"
    models, steps = (list(dict.fromkeys(names)) for names in zip(*scores))
    known = {key: (score["mean"], score["standard_error"] or 0) for key, score in scores.items()
             if score["mean"] is not None}  # fmt: skip
    low = min((mean - error for mean, error in known.values()), default=0.0)
    high = max((mean + error for mean, error in known.values()), default=0.0)
    margin = 0.08 * (high - low) or abs(high) * 0.1 or 1.0
    low, high = low - margin, high + margin
    column, scale = width / len(steps), height / (high - low)

    bold = ImageFont.load_default(size=28)
    draw.text((left, top - 48), shorten(title, width, bold), fill="black", font=bold)
    for value, text in ticks(low, high):
        y = top + (high - value) * scale
        draw.line((left, y, left + width, y), fill="#e3e6ea", width=2)
        draw.text((left - 14, y - 14), text, fill=gray, font=font, anchor="ra")
    for index, step in enumerate(steps):
        x, text = left + (index + 0.5) * column, shorten(step, int(column), font)
        draw.text((x, top + height + 12), text, fill=gray, font=font, anchor="ma")
    draw.text((left + width, top + height + 42), "steps", fill=gray, font=font, anchor="ra")
    for model_index, model in enumerate(models):
        color, points = COLORS[model_index % len(COLORS)], []
        # side by side, so that no model's bars hide another's
        shift = (model_index - (len(models) - 1) / 2) * min(14, column / (2 * len(models)))
        for index, step in enumerate(steps):
            if (model, step) in known:
                mean, error = known[model, step]
                x, y = left + (index + 0.5) * column + shift, top + (high - mean) * scale
                points.append((x, y))
                draw.line((x, y - error * scale, x, y + error * scale), fill=color, width=3)
                draw.ellipse((x - 8, y - 8, x + 8, y + 8), fill=color)
        draw.line(points, fill=color, width=5, joint="curve")


def data_uri(image: Image.Image, largest: int = 4096) -> str:
    """An image of at most `largest` px as a data URI, PNG or JPEG, whichever is smaller."""
    image = image.copy()
    image.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    encoded = []
    for kind, options in {"png": {"optimize": True}, "jpeg": {"quality": 88}}.items():
        buffer = io.BytesIO()
        image.save(buffer, format=kind, **options)
        encoded.append(f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}")
    return min(encoded, key=len)


# ---- HTML ----


def html_report(
    results: dict,
    cards: Iterable[tuple[str, dict[str, dict[str, list[Image.Image]]]]],
    *,
    means: dict[str, dict[str, dict[str, list[float | None]]]],
    grids: dict[str, Image.Image],
    plot: Image.Image | None,
) -> str:
    """One page with everything in it: report.html, filled in.

    Args:
        cards: prompts and their images, steps -> model -> images.
        means: steps -> model -> measure -> the mean of the images on each card.
        grids: steps -> grid.
        plot: of several numbers of steps.
    """
    labels, num_prompts, plot_section = labels_of(results), results["num_prompts"], ""
    if plot is not None:  # shown at half the size that it is drawn at
        image = f'<img class=plot alt="the scores against the steps" width={plot.width // 2} src="{data_uri(plot)}">'
        plot_section = f"<h2>By number of steps</h2>{image}"
    captions = {steps: f"<figcaption>{html.escape(steps_label(steps))}</figcaption>" for steps in grids}
    figures = [
        f'<figure>{captions[steps]}<img alt="" src="{data_uri(grid)}"></figure>' for steps, grid in grids.items()
    ]
    cards = [_card(index, prompt, pictures) for index, (prompt, pictures) in enumerate(cards)]
    measures = [
        {"name": measure["name"], "label": labels[measure["name"]], "sign": 1 if measure["higher_is_better"] else -1}
        for measure in results["measures"]
    ]
    data = {"means": means, "measures": measures, "models": models_of(results)}
    page = files("pso_utils.evaluate").joinpath("report.html").read_text(encoding="utf-8")
    return Template(page).substitute(
        title=html.escape(results["title"]),
        settings=" · ".join(html.escape(line) for line in results["settings"]),
        table=_html_table(results),
        notes="".join(f"<p class=note>{html.escape(line)}</p>" for line in notes(results)),
        plot=plot_section,
        grids="".join(figures),
        count=f"{len(cards)} of {num_prompts}" if len(cards) < num_prompts else f"all {num_prompts}",
        cards="".join(cards),
        data=json.dumps(data).replace("</", "<\\/"),
    )


def _html_table(results: dict) -> str:
    header = ["model", "steps", *labels_of(results).values(), *TIMINGS.values()]
    lines, previous = [], None
    for row in results["rows"]:
        scores = "".join(_html_score(row["scores"][m["name"]], m["higher_is_better"]) for m in results["measures"])
        timings = "".join(f"<td class=time>{row[key]:.3g}</td>" for key in TIMINGS)
        first = " class=first" if row["model"] != previous else ""
        names = f"<th>{html.escape(row['model'])}</th><td>{html.escape(row['steps'])}</td>"
        lines.append(f"<tr{first}>{names}{scores}{timings}</tr>")
        previous = row["model"]
    head = "".join(f"<th>{html.escape(label)}</th>" for label in header)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _html_score(score: dict, higher_is_better: bool) -> str:
    mean, error, gain, wins = score_texts(score)
    text = f"<td><b>{mean}</b><span class=error>{error}</span>"
    if gain:
        (low, high), verdict = score["interval"], "even"
        if low is not None and not low <= 0 <= high:
            verdict = "better" if (low > 0) == higher_is_better else "worse"
        text += f"<div class='gain {verdict}'>{gain}</div><div class=wins>wins {wins}</div>"
    return text + "</td>"


def _card(index: int, prompt: str, pictures: dict[str, dict[str, list[Image.Image]]]) -> str:
    strips = ""
    for steps, by_model in pictures.items():
        figures = ""
        for model, images in by_model.items():
            tiles = "".join(
                f'<img alt="" class={"tiny" if image.width < 96 else "plain"} src="{data_uri(image, largest=256)}">'
                for image in images
            )
            name = html.escape(model, quote=True)
            figures += (
                f'<figure data-model="{name}"><div class="tiles n{min(len(images), 2)}">{tiles}</div>'
                f"<figcaption title='{name}'><span>{name}</span> <span class=score></span></figcaption></figure>"
            )
        strips += f'<div class=strip data-steps="{html.escape(steps, quote=True)}">{figures}</div>'
    title = html.escape(prompt or "(no prompt)", quote=True)
    heading = f'<h3><span title="{title}">{title}</span><span class=badge></span></h3>'
    return f"<article data-index={index}>{heading}{strips}</article>"
