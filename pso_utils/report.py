"""What an evaluation shows: a Markdown table, grids, a plot against steps, and one HTML page that needs no network.

Everything is made from `results`, as `evaluate` writes it to results.json, and from the images.
"""

import base64
import html
import io
import json
import math
from collections.abc import Callable, Sequence
from string import Template

from PIL import Image, ImageDraw, ImageFont

from pso_utils.validation import fit_tile, shorten


COLORS = ["#5f6368", "#1a73e8", "#d93025", "#188038", "#e37400", "#9334e6", "#12858d", "#b31412"]
TIMINGS = {"images_per_second": "images/s", "seconds_per_image": "s/image"}


# ---- Numbers ----


def number(value: float | None, error: float | None = None, sign: bool = False) -> str:
    """A number with as many decimals as its error has two digits, or four digits; a dash for none."""
    if value is None or math.isnan(value):
        return "–"
    if error and math.isfinite(error):
        decimals = min(max(1 - math.floor(math.log10(error)), 0), 6)
        return f"{value:{'+' if sign else ''}.{decimals}f}"
    return f"{value:{'+' if sign else ''}.4g}" if value else "0"


def with_error(score: dict) -> str:
    text = number(score["mean"], score["standard_error"])
    return f"{text} ± {number(*[score['standard_error']] * 2)}" if score["standard_error"] is not None else text


def gain(score: dict) -> str:
    error = score["difference_standard_error"]
    return number(score["difference"], error, sign=True)


def interval(score: dict) -> str:
    error = score["difference_standard_error"]
    low, high = score["interval"]
    return f"[{number(low, error, sign=True)}, {number(high, error, sign=True)}]"


def labels_of(results: dict) -> dict[str, str]:
    """Measure -> its heading: of `module:function` and `imscore:NAME` the latter part, where that is enough to tell
    them apart; with an arrow down where lower is better."""
    names = [measure["name"] for measure in results["measures"]]
    short = [name.rpartition(":")[2] for name in names]
    arrows = ["" if measure["higher_is_better"] else " ↓" for measure in results["measures"]]
    return {name: (end if short.count(end) == 1 else name) + arrow for name, end, arrow in zip(names, short, arrows)}


def steps_label(steps: str) -> str:
    return "1 step" if steps == "1" else f"{steps} steps" if steps.isdigit() else f"timesteps {steps}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f}%"


def notes(results: dict) -> list[str]:
    """What a reader of the numbers must know, failures first."""
    lines, labels = [], labels_of(results)
    for measure in results["measures"]:
        scores = [row["scores"][measure["name"]] for row in results["rows"]]
        failed = [score["failed"] for score in scores]
        if measure["kind"] != "data" and any(failed):  # of the data's, a single image has no diversity: no failure
            where = "; ".join(
                f"{row['model']}, {steps_label(row['steps'])}: {count}"
                for row, count in zip(results["rows"], failed)
                if count
            )
            lines.append(
                f"{labels[measure['name']]} failed on {sum(failed)} of "
                f"{sum(failed) + sum(score['count'] for score in scores)} images ({where}): they are left out, in "
                "gains and wins with their partners."
            )
    drawn = f"Prompts: {results['num_prompts']}, images of each: {results['images_per_prompt']}; every model draws from"
    scored = (
        "Mean ± standard error over prompts; gain: the mean difference to the base from the same noise, with its 95% "
        "bootstrap interval over prompts; wins: the share of images that score better than the base's, a tie counting "
        "half. "
    )
    if not all(measure["higher_is_better"] for measure in results["measures"]):
        scored += "↓: lower is better. "
    time = "Time: drawing and decoding on one process, its median."
    lines.append(f"{drawn} the same noise. {scored if results['measures'] else ''}{time}")
    return lines


# ---- Markdown ----


def markdown_table(results: dict) -> str:
    names = [measure["name"] for measure in results["measures"]]
    labels, header, lines = labels_of(results), ["model", "steps"], []
    for name in names:
        header += [labels[name], "gain", "wins"]
    for row in results["rows"]:
        cells = [row["model"], row["steps"]]
        for name in names:
            score = row["scores"][name]
            cells.append(with_error(score))
            if "difference" in score:
                cells += [f"{gain(score)} {interval(score)}", percent(score["win_rate"])]
            else:
                cells += ["", ""]
        lines.append(cells + [f"{row[key]:.3g}" for key in TIMINGS])
    rows = [header + list(TIMINGS.values()), ["---"] * (len(header) + len(TIMINGS)), *lines]
    # a "|" in the name of one's own reward would end its cell
    table = "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |" for cells in rows)
    return table + "\n\n" + "\n".join(f"- {line}" for line in notes(results)) + "\n"


# ---- Pictures ----


def model_grid(rows: dict[str, Sequence[Image.Image]], prompts: Sequence[str]) -> Image.Image:
    """Rows: models; columns: prompts. Images of one column are drawn from the same noise."""
    tiles = [[fit_tile(image, largest=256) for image in images] for images in rows.values()]
    width, height = tiles[0][0].size
    font = ImageFont.load_default(size=13)
    gap, margin = 4, 8
    label = margin + min(180, max(int(font.getlength(name)) for name in rows)) + margin
    top = margin + 18
    size = (label + len(prompts) * (width + gap), top + len(rows) * (height + gap) + margin)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for x, prompt in enumerate(prompts):
        caption = shorten(prompt or "(no prompt)", width, font)
        draw.text((label + x * (width + gap), margin), caption, fill="dimgray", font=font)
    for y, (name, images) in enumerate(zip(rows, tiles)):
        place = top + y * (height + gap)
        draw.text((margin, place + height // 2 - 8), shorten(name, 180, font), fill="black", font=font)
        for x, image in enumerate(images):
            picture.paste(image, (label + x * (width + gap), place))
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
    models = list(dict.fromkeys(row["model"] for row in results["rows"]))
    steps = list(dict.fromkeys(row["steps"] for row in results["rows"]))
    width, height, left, top, bottom, line, columns = 620, 400, 150, 70, 80, 40, 3
    labels = labels_of(results)
    columns = min(columns, len(labels))
    cell_width, cell_height = left + width + 40, top + height + bottom
    font, bold = ImageFont.load_default(size=24), ImageFont.load_default(size=28)
    places, x, y = [], left, -(-len(labels) // columns) * cell_height  # of the models in the legend
    names = [shorten(model, cell_width - left - 60, font) for model in models]
    for name in names:
        entry = 60 + int(font.getlength(name))
        if x > left and x + entry > columns * cell_width:
            x, y = left, y + line
        places.append((x, y))
        x += entry
    picture = Image.new("RGB", (columns * cell_width, y + line + 10), "white")
    draw = ImageDraw.Draw(picture)

    for index, name in enumerate(labels):
        x0, y0 = index % columns * cell_width + left, index // columns * cell_height + top
        scores = {(row["model"], row["steps"]): row["scores"][name] for row in results["rows"]}
        scores = {key: score for key, score in scores.items() if score["mean"] is not None}
        ends = [
            score["mean"] + side * (score["standard_error"] or 0) for score in scores.values() for side in (-1, 1)
        ] or [0.0]
        low, high = min(ends), max(ends)
        margin = 0.08 * (high - low) or abs(high) * 0.1 or 1.0
        low, high = low - margin, high + margin

        def place(step, value, x0=x0, y0=y0, low=low, high=high):
            x = x0 + (steps.index(step) + 0.5) / len(steps) * width
            return x, y0 + (high - value) / (high - low) * height

        title = labels[name].replace(" ↓", " (lower is better)")  # Pillow's font has no arrows
        draw.text((x0, y0 - 48), shorten(title, width, bold), fill="black", font=bold)
        for value, text in ticks(low, high):
            y = place(steps[0], value)[1]
            draw.line((x0, y, x0 + width, y), fill="#e3e6ea", width=2)
            draw.text((x0 - 14 - font.getlength(text), y - 14), text, fill="#5f6368", font=font)
        for step in steps:
            x = place(step, low)[0]
            text = shorten(step, width // len(steps), font)
            draw.text((x - font.getlength(text) / 2, y0 + height + 12), text, fill="#5f6368", font=font)
        draw.text((x0 + width - font.getlength("steps"), y0 + height + 42), "steps", fill="#5f6368", font=font)
        for number_, model in enumerate(models):
            color = COLORS[number_ % len(COLORS)]
            shown = [(step, scores[model, step]) for step in steps if (model, step) in scores]
            # side by side, so that no model's bars hide another's
            shift = (number_ - (len(models) - 1) / 2) * min(14, width / len(steps) / (2 * len(models)))
            points = [(x + shift, y) for x, y in (place(step, score["mean"]) for step, score in shown)]
            draw.line(points, fill=color, width=5, joint="curve")
            for (x, y), (step, score) in zip(points, shown):
                error = score["standard_error"] or 0
                bar = [place(step, score["mean"] + side * error)[1] for side in (-1, 1)]
                draw.line((x, bar[0], x, bar[1]), fill=color, width=3)
                draw.ellipse((x - 8, y - 8, x + 8, y + 8), fill=color)
    for number_, (name, (x, y)) in enumerate(zip(names, places)):
        draw.ellipse((x, y + 6, x + 18, y + 24), fill=COLORS[number_ % len(COLORS)])
        draw.text((x + 28, y), name, fill="black", font=font)
    return picture


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
    prompts: Sequence[str],
    means: dict[str, dict[str, dict[str, list[float | None]]]],
    grids: dict[str, Image.Image],
    plot: Image.Image | None,
    pictures: Callable[[str, str, int], list[Image.Image]],
) -> str:
    """One page with everything in it.

    Args:
        prompts: those that get a card.
        means: steps -> model -> measure -> the mean of each of these prompts' images.
        grids: steps -> grid.
        pictures: (steps, model, place of the prompt) -> its images.
    """
    models = list(dict.fromkeys(row["model"] for row in results["rows"]))
    measures = [
        {"name": measure["name"], "sign": 1 if measure["higher_is_better"] else -1} for measure in results["measures"]
    ]
    figures = "".join(_figure(steps_label(steps), data_uri(grid)) for steps, grid in grids.items())
    plot_section = ""
    if plot is not None:  # it is drawn at twice its size
        image = f'<img class=plot alt="the scores against the steps" width={plot.width // 2} src="{data_uri(plot)}">'
        plot_section = f"<h2>By number of steps</h2>{image}"
    cards = "".join(
        _card(index, prompt, {steps: {m: pictures(steps, m, index) for m in models} for steps in grids})
        for index, prompt in enumerate(prompts)
    )
    shown = len(prompts)
    data = json.dumps({"means": means, "measures": measures, "models": models}).replace("</", "<\\/")
    return Template(PAGE).substitute(
        title=html.escape(results["title"]),
        facts=" · ".join(html.escape(fact) for fact in results["facts"]),
        table=_html_table(results),
        notes="".join(f"<p class=note>{html.escape(line)}</p>" for line in notes(results)),
        plot=plot_section,
        grids=figures,
        count=f"{shown} of {results['num_prompts']}" if shown < results["num_prompts"] else f"all {shown}",
        cards=cards,
        data=data,
        steps_options=_options(list(grids), len(grids) - 1),
        model_options=_options(models[1:], len(models) - 2),
        measure_options=_options([measure["name"] for measure in measures], 0, labels_of(results).get),
        compare_hidden="" if len(models) > 1 and measures else "hidden",
        score_hidden="" if measures else "hidden",
    )


def _options(names: list[str], selected: int, label: Callable[[str], str] = str) -> str:
    return "".join(
        f'<option value="{html.escape(name, quote=True)}"{" selected" if index == selected else ""}>'
        f"{html.escape(label(name))}</option>"
        for index, name in enumerate(names)
    )


def _figure(caption: str, source: str) -> str:
    return f'<figure><figcaption>{html.escape(caption)}</figcaption><img alt="" src="{source}"></figure>'


def _html_table(results: dict) -> str:
    head = "".join(f"<th>{html.escape(label)}</th>" for label in labels_of(results).values())
    head += "".join(f"<th>{label}</th>" for label in TIMINGS.values())
    lines, previous = [], None
    for row in results["rows"]:
        cells = ""
        for measure in results["measures"]:
            score = row["scores"][measure["name"]]
            cells += f"<td><b>{number(score['mean'], score['standard_error'])}</b>"
            if score["standard_error"] is not None:
                cells += f"<span class=error> ± {number(*[score['standard_error']] * 2)}</span>"
            if "difference" in score:
                kind = _verdict(score["interval"], measure["higher_is_better"])
                cells += (
                    f"<div class='gain {kind}'>{gain(score)} <span>{interval(score)}</span></div>"
                    f"<div class=wins>wins {percent(score['win_rate'])}</div>"
                )
            cells += "</td>"
        cells += "".join(f"<td class=time>{row[key]:.3g}</td>" for key in TIMINGS)
        first = " class=first" if row["model"] != previous else ""
        lines.append(f"<tr{first}><th>{html.escape(row['model'])}</th><td>{html.escape(row['steps'])}</td>{cells}</tr>")
        previous = row["model"]
    return f"<table><thead><tr><th>model</th><th>steps</th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _verdict(limits: Sequence[float | None], higher_is_better: bool) -> str:
    low, high = limits
    if low is None or low <= 0 <= high:
        return "even"
    return "better" if (low > 0) == higher_is_better else "worse"


def _card(index: int, prompt: str, pictures: dict[str, dict[str, list[Image.Image]]]) -> str:
    strips = ""
    for steps, by_model in pictures.items():
        figures = ""
        for model, images in by_model.items():
            tiles = "".join(f'<img alt="" src="{data_uri(image, largest=256)}">' for image in images)
            name = html.escape(model, quote=True)
            figures += (
                f'<figure data-model="{name}"><div class="tiles n{min(len(images), 2)}">{tiles}</div>'
                f"<figcaption title='{name}'><span>{name}</span> <span class=score></span></figcaption></figure>"
            )
        strips += f'<div class=strip data-steps="{html.escape(steps, quote=True)}">{figures}</div>'
    title = html.escape(prompt or "(no prompt)", quote=True)
    heading = f'<h3><span title="{title}">{title}</span><span class=badge></span></h3>'
    return f"<article data-index={index}>{heading}{strips}</article>"


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { color-scheme: light dark; --text: #1f2328; --dim: #667079; --line: #dfe3e8; --card: #fff; --page: #f6f7f9;
  --good: #116b36; --good-back: #e2f5e9; --bad: #a3211a; --bad-back: #fde9e7; --even-back: #eef0f3; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e9ed; --dim: #9aa4ae; --line: #333a42; --card: #1b1f24;
  --page: #121518; --good: #7fdca0; --good-back: #173524; --bad: #ff9d94; --bad-back: #43211e; --even-back: #2a3037; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans",
  sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 40px 0 12px; }
.facts, .note { color: var(--dim); margin: 4px 0; font-size: 13.5px; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  margin: 20px 0 12px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 9px 14px; vertical-align: top; white-space: nowrap; }
thead th { font-size: 13px; color: var(--dim); font-weight: 600; border-bottom: 1px solid var(--line); }
tbody th { font-weight: 600; } tbody tr.first > * { border-top: 1px solid var(--line); }
tbody tr:first-child > * { border-top: 0; } tbody tr:not(.first) th { color: transparent; }
.error, .wins, .time { color: var(--dim); } .wins { font-size: 12.5px; }
.gain { width: fit-content; border-radius: 5px; padding: 0 7px; font-size: 13px; margin-top: 2px; }
.gain span { opacity: .75; }
.better { color: var(--good); background: var(--good-back); } .worse { color: var(--bad); background: var(--bad-back); }
.even { background: var(--even-back); }
figure { margin: 0; }
.plot { max-width: 100%; height: auto; border-radius: 10px; border: 1px solid var(--line); }
.grids { display: flex; flex-wrap: wrap; gap: 16px 24px; } .grids figure { max-width: 100%; }
.grids img { max-width: 100%; border-radius: 8px; border: 1px solid var(--line); }
figcaption { font-size: 13px; color: var(--dim); padding: 2px 0 4px; }
.controls { display: flex; flex-wrap: wrap; gap: 10px 18px; position: sticky; top: 0; padding: 10px 0; z-index: 1;
  background: var(--page); border-bottom: 1px solid var(--line); margin-bottom: 16px; }
label { font-size: 13px; color: var(--dim); } label[hidden] { display: none; }
select { font: inherit; color: var(--text); background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  padding: 3px 6px; margin-left: 4px; max-width: 220px; }
#cards { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); }
article { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px;
  min-width: 0; }
h3 { font-size: 14px; margin: 0 0 8px; font-weight: 600; display: flex; gap: 10px; justify-content: space-between; }
h3 span:first-child { overflow: hidden; overflow-wrap: anywhere; display: -webkit-box; -webkit-box-orient: vertical;
  -webkit-line-clamp: 3; }
.badge { border-radius: 5px; padding: 0 7px; font-weight: 500;
  white-space: nowrap; align-self: flex-start; }
.strip { display: grid; grid-template-columns: repeat(auto-fit, minmax(108px, 1fr)); gap: 10px; }
.strip figure { max-width: 260px; min-width: 0; }
.strip[hidden] { display: none; }
.tiles { display: grid; gap: 3px; } .tiles.n2 { grid-template-columns: 1fr 1fr; }
.tiles img { width: 100%; display: block; border-radius: 5px; }
.tiles img.tiny { image-rendering: pixelated; }
.strip figcaption { white-space: nowrap; display: flex; gap: 6px; }
.strip figcaption span:first-child { overflow: hidden; text-overflow: ellipsis; }
.score { color: var(--text); font-variant-numeric: tabular-nums; }
</style>
</head>
<body>
<main>
<h1>$title</h1>
<p class=facts>$facts</p>
<div class=scroll>$table</div>
$notes
$plot
<h2>The same noise under every model</h2>
<div class=grids>$grids</div>
<h2>Prompt by prompt ($count)</h2>
<div class=controls>
<label>steps <select id=steps>$steps_options</select></label>
<label $score_hidden>score <select id=measure>$measure_options</select></label>
<label $compare_hidden>gain of <select id=model>$model_options</select></label>
<label $score_hidden>order <select id=order><option value=down>largest gain first</option>
<option value=up>smallest gain first</option><option value=prompt>as in the prompts</option></select></label>
</div>
<div id=cards>$cards</div>
</main>
<script>
"use strict";
const DATA = $data;
const control = Object.fromEntries(["steps", "measure", "model", "order"].map(id => [id, document.getElementById(id)]));
const cards = [...document.querySelectorAll("article")];
const base = DATA.models[0];

// An own scale of each score: as many digits as tell its gains apart
function format(value, sign) {
  if (value === null) return "failed";
  const text = Math.abs(value) >= 100 ? value.toFixed(0) : value.toPrecision(3);
  return (sign && value > 0 ? "+" : "") + (value === 0 ? "0" : text);
}

function gainOf(index) {
  const means = DATA.means[control.steps.value], measure = control.measure.value, model = control.model.value;
  if (!measure) return null;
  if (!model) return means[base][measure][index];
  const after = means[model][measure][index], before = means[base][measure][index];
  return after === null || before === null ? null : after - before;
}

function show() {
  const means = DATA.means[control.steps.value], measure = control.measure.value;
  const sign = DATA.measures.find(entry => entry.name === measure)?.sign ?? 1;
  const compared = measure && control.model.value;
  const gains = cards.map(card => gainOf(+card.dataset.index));
  const key = new Map(cards.map((card, place) => [card, gains[place] === null ? -Infinity : sign * gains[place]]));
  for (const card of cards) {
    const index = +card.dataset.index, value = gainOf(index), badge = card.querySelector(".badge");
    badge.textContent = compared ? format(value, true) : "";
    const better = value === null || value === 0 ? "even" : sign * value > 0 ? "better" : "worse";
    badge.className = "badge " + (compared ? better : "");
    for (const strip of card.querySelectorAll(".strip")) strip.hidden = strip.dataset.steps !== control.steps.value;
    if (measure) for (const figure of card.querySelectorAll(".strip:not([hidden]) figure"))
      figure.querySelector(".score").textContent = format(means[figure.dataset.model][measure][index], false);
  }
  const order = {
    down: (a, b) => key.get(b) - key.get(a) || a.dataset.index - b.dataset.index,
    up: (a, b) => (key.get(a) === -Infinity) - (key.get(b) === -Infinity) || key.get(a) - key.get(b) ||
      a.dataset.index - b.dataset.index,
    prompt: (a, b) => a.dataset.index - b.dataset.index,
  }[control.order.value];
  document.getElementById("cards").append(...[...cards].sort(order));
}

// The choice stands in the address, so that a view can be linked to
for (const [name, value] of new URLSearchParams(location.hash.slice(1)))
  if (control[name] && [...control[name].options].some(option => option.value === value)) control[name].value = value;
for (const select of Object.values(control)) select.addEventListener("change", () => {
  location.hash = new URLSearchParams(Object.entries(control).map(([name, select]) => [name, select.value]));
  show();
});
for (const image of document.images) if (image.naturalWidth && image.naturalWidth < 96) image.classList.add("tiny");
show();
window.addEventListener("load", () => {
  const loaded = [...document.images].filter(image => image.complete && image.naturalWidth > 0);
  for (const image of loaded) if (image.naturalWidth < 96) image.classList.add("tiny");
  document.documentElement.dataset.loaded = loaded.length + "/" + document.images.length;
  const others = performance.getEntriesByType("resource").filter(entry => !entry.name.startsWith("data:"));
  document.documentElement.dataset.requests = others.length;
});
</script>
</body>
</html>
"""
