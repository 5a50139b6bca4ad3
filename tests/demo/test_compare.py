"""The comparison's arithmetic against closed forms, and one trial run of the whole script."""

import importlib
import math
import shlex

import pytest
import torch

from demo.compare import __main__ as compare
from demo.compare import report, rows, tasks
from demo.compare.tasks import TASKS


INSIDE = {f"{key} 4 {kind}": 1.0 for key in ("distance", "sharpness") for kind in ("name", "class")}
INSIDE["diversity"] = 0.8
OUTSIDE = INSIDE | {"distance 4 name": 1.2}


def curve(*points: tuple[float, float], guards: dict = INSIDE) -> list[dict]:
    """A curve of (share, retention), the base's own share and retention first."""
    points = ((0.3, 1.0), *points)
    return [{"share": share, "retention": kept, "step": 10 * i, **guards} for i, (share, kept) in enumerate(points)]


def measures(sharpness: float, **others: float) -> dict[str, dict]:
    """Those of a model: `sharpness` in every setting but those in `others` ("class_1")."""
    measured = {"distance": 0.05, "share": 0.3, "diversity": 0.2, "rewards": [0.0, 1.0]}
    values = {setting: others.get("_".join(reversed(setting.split())), sharpness) for setting in tasks.SETTINGS}
    return {setting: measured | {"sharpness": value} for setting, value in values.items()}


def test_at_share_is_linear_between_checkpoints():
    points = curve((0.4, 0.9), (0.6, 0.5))
    assert tasks.at_share(points, 0.5) == pytest.approx({"share": 0.5, "retention": 0.7, "step": 15} | INSIDE)
    assert tasks.at_share(points, 0.35)["retention"] == pytest.approx(0.95)
    assert tasks.at_share(points, 0.6) == pytest.approx(points[2])


def test_at_share_takes_the_first_crossing_and_none_for_a_share_never_reached():
    points = curve((0.6, 0.7), (0.4, 0.6), (0.8, 0.2))
    assert tasks.at_share(points, 0.45)["retention"] == pytest.approx(0.85)
    assert tasks.at_share(points, 0.9) is None
    assert tasks.at_share(curve((0.2, 0.5)), 0.5) is None


def test_retention_is_one_at_the_base_and_zero_at_the_teacher():
    assert tasks.retention(0.9, base=0.9, teacher=0.7) == 1
    assert tasks.retention(0.7, base=0.9, teacher=0.7) == 0
    assert tasks.retention(0.75, base=0.9, teacher=0.7) == pytest.approx(0.25)
    assert tasks.retention(1.0, base=0.9, teacher=0.7) == pytest.approx(1.5)


def test_a_summary_keeps_retention_in_the_settings_with_a_gap_alone():
    base, teacher = measures(0.9, name_1=0.8), measures(0.85, name_1=0.6, class_4=0.4)
    assert tasks.settings_with_gap(base, teacher) == ["1 name", "4 class"]
    tuned = measures(0.45, name_1=0.7, class_4=0.8)
    tuned["1 class"]["distance"] = 0.1
    tuned["4 name"] |= {"share": 0.6, "rewards": [0.5, 1.5]}
    point = tasks.summarize_preference(tuned, base, teacher)
    assert point["share"] == 0.6
    assert point["retention 1 name"] == pytest.approx(0.5)
    assert point["retention 4 class"] == pytest.approx(0.8)
    assert point["retention"] == pytest.approx(0.65)
    assert point["sharpness 2 class"] == pytest.approx(0.5)
    assert point["distance 1 class"] == 2 and point["distance 1"] == 1.5
    assert point["gain"] == pytest.approx(0.5 / math.sqrt(0.5))  # a gain of 0.5, the base's rewards being 0 and 1
    assert point["diversity"] == 1


def test_without_any_gap_there_is_no_retention():
    assert math.isnan(tasks.summarize_preference(measures(0.8), measures(0.9), measures(0.85))["retention"])


@pytest.mark.parametrize("kind", ["name", "class"])
def test_guards(kind):
    holds = TASKS["preference"].holds_guards
    assert holds(INSIDE)
    assert holds(INSIDE | {f"distance 4 {kind}": 1.1, f"sharpness 4 {kind}": 0.9})
    assert not holds(INSIDE | {f"distance 4 {kind}": 1.11})
    assert not holds(INSIDE | {f"sharpness 4 {kind}": 0.89})
    assert not holds(INSIDE | {f"sharpness 4 {kind}": 1.11})
    assert not holds(INSIDE | {"diversity": 0.79})


def test_a_sharp_sample_off_the_ink_drawings_fails_the_guards_of_style():
    holds = TASKS["style"].holds_guards
    on_data = {"distance 4 name": tasks.INK_DISTANCE, "sharpness 4 name": 1.0, "diversity": 0.8}
    assert holds(on_data) and not holds(on_data | {"diversity": 0.79})
    assert not holds(on_data | {"distance 4 name": 1.01 * tasks.INK_DISTANCE})
    assert not holds(on_data | {"sharpness 4 name": 0.84}) and not holds(on_data | {"sharpness 4 name": 1.16})


def test_a_concept_counts_while_its_class_is_drawn_as_before():
    base = {key: [0.5, 0.6, 0.7] for key in ("image cosine", "closeness", "class clip")} | {"class diversity": 0.4}
    tuned = base | {"image cosine": [0.8, 0.9, 1.1], "closeness": [0.6, 0.7, 0.8]}
    point = tasks.summarize_concept(tuned, base, base)
    assert point["share"] == pytest.approx(2.8 / 3) and point["distance"] == pytest.approx(-0.7)
    gains = torch.tensor([0.3, 0.3, 0.4])
    assert point["cosine gain"] == pytest.approx((gains.mean() / gains.std() * 3**0.5).item(), rel=1e-4)
    holds = TASKS["concept"].holds_guards
    assert holds(point)
    assert not holds(tasks.summarize_concept(tuned | {"class clip": [0.4, 0.5, 0.6]}, base, base))
    assert not holds(tasks.summarize_concept(tuned | {"class diversity": 0.3}, base, base))


def test_the_chosen_rate_goes_furthest_within_the_guards():
    fast = curve((0.5, 0.9), (0.9, 0.8))
    fast[2] |= OUTSIDE
    curves = {"slow": curve((0.4, 1.0), (0.45, 1.0)), "medium": curve((0.5, 0.7), (0.6, 0.6)), "fast": fast}
    assert tasks.choose(TASKS["preference"], curves) == "medium"


def test_outside_the_guards_the_chosen_rate_retains_most_at_the_matched_share():
    curves = {
        "short": curve((0.4, 1.0), guards=OUTSIDE),  # never reaches the share
        "medium": curve((0.5, 0.7), guards=OUTSIDE),
        "fast": curve((0.7, 0.8), guards=OUTSIDE),  # at 0.5: 0.9
    }
    assert tasks.choose(TASKS["preference"], curves) == "fast"
    assert tasks.choose(TASKS["preference"], {"short": curves["short"]}) == "short"


def test_mean_and_range():
    assert report.spread([1.0, 2.0, 6.0]) == "3.00 (1.00 to 6.00)"
    assert report.spread([0.5]) == "0.50" and report.spread([math.nan]) == report.spread([]) == "–"


def test_flags_that_cannot_work_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        compare.parse_args(["--rows", "redistilled", "--output_dir", str(tmp_path)])
    assert "needs diffusion-teacher" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compare.parse_args(["--readme", str(tmp_path / "README.md"), "--output_dir", str(tmp_path)])
    assert "pass a file with the lines" in capsys.readouterr().err
    compare.parse_args(["--fraction", "0.5", "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit):
        compare.parse_args(["--output_dir", str(tmp_path)])
    assert "'fraction': 0.5" in capsys.readouterr().err


TRIED = [
    "diffusion-teacher",
    "redistilled",
    "online-transition",
    "online-best-of-k",
    "online-nft-pull",
    "ink-ours",
    "concept-dreambooth",
]  # one of each kind


@pytest.mark.slow
def test_a_trial_writes_tables_and_pictures_and_is_not_repeated(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"above\n{report.BEGIN}\nstale\n{report.END}\nbelow\n")
    flags = ["--fraction", "0.005", "--learning_rates", "1", "--output_dir", str(tmp_path), "--readme", str(readme)]
    compare.main([*flags, "--seeds", "0", "--rows", *TRIED])
    tables = (tmp_path / "tables.md").read_text()
    for name in (*tasks.UNTUNED_MODELS, *TRIED):
        assert f"| {name} |" in tables
    assert str(tmp_path) not in tables
    assert readme.read_text().startswith("above\n") and readme.read_text().endswith("\nbelow\n")
    assert "stale" not in readme.read_text() and f"| {TRIED[0]} |" in readme.read_text()
    tried = {rows.ROWS[name].task for name in TRIED}
    for name in tried:
        for picture in (f"{name}_curves", *TASKS[name].pictures):
            assert f"]({picture}.png)" in tables and f"](comparison/{picture}.png)" in readme.read_text()
            assert (tmp_path / "comparison" / f"{picture}.png").is_file()

    first = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("run.json")}
    assert len(first) == len(tasks.UNTUNED_MODELS) * len(tried) + len(TRIED)
    compare.main([*flags, "--seeds", "0", "1", "--rows", "concept-dreambooth"])
    assert all(path.stat().st_mtime_ns == time for path, time in first.items())
    assert "| concept-dreambooth | " in (tmp_path / "tables.md").read_text()
    learning_rate = rows.ROWS["concept-dreambooth"].learning_rates[0]
    assert (tmp_path / "concept-dreambooth" / f"lr{learning_rate}-seed1" / "run.json").is_file()


def test_every_command_of_the_rows_is_one_that_its_script_takes(tmp_path):
    for row in rows.ROWS.values():
        if row.command:
            tokens = shlex.split(row.command.format(tasks=tmp_path, prepared=tmp_path))
            script, *flags = tokens[tokens[0] == "-m" :]
            args = importlib.import_module(script.removesuffix(".py")).parse_args(flags)
            assert args.num_validation_images == 0 and args.pretrained_model_name_or_path == "demo/emoji-turbo"
