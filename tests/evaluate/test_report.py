"""What the report shows, in a browser too."""

import copy
import html
import json
import re
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path

import pytest
from PIL import Image

from pso_utils.evaluate import report


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROMPTS = ["a red <b>panda</b> & </script>", "fox", "", "cactus"]
GAINS = [0.1, -0.2, None, 0.3]  # of "tuned" at 4 steps; the third prompt failed


def score(mean, difference=None):
    values = {"count": 4, "failed": 0, "mean": mean, "standard_error": 0.0123}
    if difference is not None:
        compared = {"paired": 4, "difference": difference, "difference_standard_error": 0.01, "win_rate": 0.75}
        values |= compared | {"interval": [difference - 0.02, difference + 0.02]}
    return values


@pytest.fixture
def results():
    rows = []
    for model, difference in (("base", None), ("tuned|<i>", 0.05)):
        for steps in ("1", "4"):
            scores = {"clip": score(0.5, difference), "my:own": score(-3.0, difference and -difference)}
            timing = {"images_per_second": 2.0, "seconds_per_image": 0.5}
            rows.append({"model": model, "steps": steps, "num_steps": int(steps), "scores": scores, **timing})
    measures = [
        {"name": "clip", "kind": "reward", "higher_is_better": True},
        {"name": "my:own", "kind": "reward", "higher_is_better": False},
    ]
    header = {"title": "base & <tuned>", "settings": ["32 px"], "num_prompts": 4, "images_per_prompt": 1}
    return {**header, "measures": measures, "rows": rows}


def picture(steps, model, index, size=32):
    return Image.new("RGB", (size, size), (40 * index, 30 * int(steps), 200 if model == "base" else 90))


@pytest.fixture
def page(results):
    models = [row["model"] for row in results["rows"][::2]]
    own = {models[0]: [0.5] * 4, models[1]: [None if gain is None else 0.5 + gain for gain in GAINS]}
    means = {
        steps: {model: {"clip": own[model], "my:own": [-3.0, -2.0, -1.0, -4.0]} for model in models}
        for steps in ("1", "4")
    }
    grids = {
        steps: report.model_grid({m: [picture(steps, m, i) for i in range(4)] for m in models}, PROMPTS)
        for steps in ("1", "4")
    }
    cards = [
        (prompt, {s: {m: [picture(s, m, i, size=300)] for m in models} for s in ("1", "4")})
        for i, prompt in enumerate(PROMPTS)
    ]
    return report.html_report(results, cards, means=means, grids=grids, plot=report.steps_plot(results))


def test_the_template_is_packaged():
    template = files("pso_utils.evaluate").joinpath("report.html").read_text(encoding="utf-8")
    assert template.startswith("<!DOCTYPE html>") and "$cards" in template
    setup = (Path(__file__).parents[2] / "setup.py").read_text()
    assert '"pso_utils.evaluate": ["report.html"]' in setup  # of package_data


def test_numbers_have_the_decimals_of_their_error():
    assert report.number(0.53217, 0.0123) == "0.532" and report.number(0.53217, 0.00123) == "0.5322"
    assert report.number(123.456, 7.0) == "123.5" and report.number(1234.5, 250) == "1234"
    assert report.number(0.05, 0.0123, sign=True) == "+0.050" and report.number(-0.05, 0.0123, sign=True) == "-0.050"
    assert report.number(0.0, 0.0) == "0" and report.number(None) == report.number(float("nan")) == "–"


def test_ticks_are_round_numbers_inside():
    assert [text for _, text in report.ticks(0.391, 0.593)] == ["0.40", "0.45", "0.50", "0.55"]
    assert [text for _, text in report.ticks(-3.2, 8)] == ["-2", "0", "2", "4", "6", "8"]
    assert all(len(report.ticks(1, 1 + span)) in range(2, 7) for span in (1e-4, 0.3, 1, 2.1, 7, 35, 999))


def test_the_markdown_table_has_a_row_for_each_model_and_number_of_steps(results):
    lines = report.markdown_table(results).splitlines()
    assert lines[0] == "| model | steps | clip | gain | wins | own ↓ | gain | wins | images/s | s/image |"
    assert lines[2] == "| base | 1 | 0.500 ± 0.012 |  |  | -3.000 ± 0.012 |  |  | 2 | 0.5 |"
    assert "+0.050 [+0.030, +0.070] | 75%" in lines[5]
    assert {line.count("|") for line in lines[:6]} == {11}  # the "|" in a name is no cell's end
    failed = copy.deepcopy(results)
    failed["rows"][3]["scores"]["clip"] |= {"failed": 1, "count": 3}
    assert "clip failed on 1 of 16 images (tuned|<i>, 4 steps: 1)" in report.markdown_table(failed)


def test_rewards_with_one_name_are_told_apart_and_lower_is_better_is_said(results):
    assert report.labels_of(results) == {"clip": "clip", "my:own": "own ↓"}
    assert "↓: lower is better" in report.markdown_table(results)
    for measure, name in zip(results["measures"], ("my:clip", "your:clip")):
        measure["name"], measure["higher_is_better"] = name, True
    assert report.labels_of(results) == {"my:clip": "my:clip", "your:clip": "your:clip"}


def test_the_plots_legend_names_every_model_however_many_there_are(results):
    few = report.steps_plot(results)
    for index in range(8):
        rows = [row for row in results["rows"] if row["model"] == "base"]
        results["rows"] += [row | {"model": f"a model with a long name, number {index}"} for row in rows]
    picture = report.steps_plot(results)
    assert picture.width == few.width and picture.height > few.height
    shown = {color for _, color in picture.getcolors(picture.width * picture.height)}
    assert {tuple(bytes.fromhex(color[1:])) for color in report.COLORS} <= shown
    last = picture.crop((0, picture.height - 50, picture.width, picture.height))  # its last line is a legend's, inside
    assert last.getbbox() and last.crop((last.width - 20, 0, last.width, 50)).getextrema() == ((255, 255),) * 3


def test_what_cannot_be_told_is_a_dash(results):
    for row in results["rows"]:
        row["scores"]["clip"] |= {"standard_error": None, "difference_standard_error": None, "interval": [None, None]}
    assert "| +0.05 [–, –] | 75%" in report.markdown_table(results)
    assert report.steps_plot(results).size[0] > 0


def test_the_page_holds_everything_and_asks_for_nothing(page):
    assert not re.search(r"""(src|href|action|url\(|import)\s*[=(]?\s*["']?(https?:|//|\.|/)""", page)
    sources = re.findall(r'src="(\S+?)"', page)
    assert len(sources) == 2 + 1 + 2 * 2 * 4 and all(source.startswith("data:image/") for source in sources)
    assert "default-src 'none'" in page and page.count("<script>") == page.count("</script>") == 1
    assert "<b>panda" not in page and "a red &lt;b&gt;panda" in page and "base &amp; &lt;tuned&gt;" in page
    assert re.search(r"<div class=grids>(<figure>.*?</figure>){2}</div>", page)  # and nothing between them
    assert "class='gain better'" in page and "class='gain worse'" not in page  # lower is better, and it is lower


COUNT_LOADED = """<script>
window.addEventListener("load", () => {
  const loaded = [...document.images].filter(image => image.complete && image.naturalWidth > 0);
  document.documentElement.dataset.loaded = loaded.length + "/" + document.images.length;
  const others = performance.getEntriesByType("resource").filter(entry => !entry.name.startsWith("data:"));
  document.documentElement.dataset.requests = others.length;
});
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian: apt-get install chromium)")
@pytest.mark.parametrize(
    "order, expected", [("down", [3, 0, 1, 2]), ("up", [1, 0, 3, 2]), ("prompt", [0, 1, 2, 3])]
)  # the one that failed is last
def test_the_page_opens_in_a_browser_with_every_picture_and_sorts(page, tmp_path, order, expected):
    (tmp_path / "report.html").write_text(page.replace("</body>", COUNT_LOADED + "</body>"), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    command += ["--virtual-time-budget=5000", "--dump-dom", f"{tmp_path.as_uri()}/report.html#order={order}&steps=4"]
    dom = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    assert 'data-loaded="19/19"' in dom and 'data-requests="0"' in dom
    assert [int(index) for index in re.findall(r'<article data-index="(\d)"', dom)] == expected
    badges = dict(zip(expected, re.findall(r'class="badge (\w+)">([^<]*)<', dom)))
    assert badges[0] == ("better", "+0.100") and badges[1] == ("worse", "-0.200") and badges[2] == ("even", "failed")
    shown = re.findall(r'<div class="strip" data-steps="(\d)"( hidden="")?>', dom)
    assert set(shown) == {("1", ' hidden=""'), ("4", "")}
    selects = dict(re.findall(r'<select id="(\w+)">(.*?)</select>', dom, re.DOTALL))
    options = {name: re.findall(r"<option value=\"([^\"]*)\"[^>]*>([^<]*)<", text) for name, text in selects.items()}
    assert options["steps"] == [("1", "1"), ("4", "4")] and options["measure"] == [
        ("clip", "clip"),
        ("my:own", "own ↓"),
    ]
    assert [html.unescape(text) for text in options["model"][0]] == ["tuned|<i>"] * 2


def test_means_in_the_page_are_json(page):
    data = json.loads(re.search(r"const DATA = (.*);\n", page)[1])
    assert data["means"]["4"]["base"]["clip"] == [0.5] * 4
    assert data["measures"][1] == {"name": "my:own", "label": "own ↓", "sign": -1}
