"""The flags: their help, and the checks that need nothing but them."""

import argparse
import os

import pytest

import train_pso_lora_sdxl
import train_pso_online
from pso_utils.errors import UserError
from pso_utils.run import arguments


SCRIPTS = [train_pso_online, train_pso_lora_sdxl]
REQUIRED = {
    train_pso_online: ["--pretrained_model_name_or_path", "model", "--reward", "clip"],
    train_pso_lora_sdxl: ["--pretrained_model_name_or_path", "model", "--task", "style"],
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_defaults_that_are_values(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "10000")  # one flag a line
    with pytest.raises(SystemExit) as stop:
        script.parse_args(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for nothing in ("(default: None)", "(default: [])", "(default: False)"):
        assert nothing not in text
    assert "(default: 1e-05)" in text
    values = vars(script.parse_args(REQUIRED[script]))
    assert all(f"--{name}" in text for name in values)


def test_help_names_the_defaults_that_depend_on_task_and_weighting(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "10000")
    with pytest.raises(SystemExit):
        train_pso_lora_sdxl.parse_args(["--help"])
    flags = {text.split()[0]: text for text in capsys.readouterr().out.split("\n  --")}
    assert "5 for hinge, epsilon; 30 for preference, mdp; 10 for preference, x0" in flags["beta"]
    assert "60 for preference, mdp" in flags["target_anchor"] and "0 for other weightings" in flags["target_anchor"]
    assert "0.05 for style, x0; 0.2 for concept, x0" in flags["reference_weight"]
    assert "Default: 10" in flags["class_anchor"] and "0.5 for hinge" in flags["prior_loss_weight"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_that_are_unknown_abbreviated_or_gone_are_one_line(script, capsys):
    for flag in (["--nonsense"], ["--learning_rat", "1"], ["--enable_vae_slicing"], ["--log_gradient_shares"]):
        with pytest.raises(SystemExit) as stop:
            script.parse_args(REQUIRED[script] + flag)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and error.startswith("error:") and flag[0] in error


@pytest.mark.parametrize(
    "convert, good, bad",
    [
        (
            arguments.positive_int,
            {"1": 1, "12": 12},
            {"0": "of at least 1", "-1": "must be", "1.5": "a whole number", "x": "must be"},
        ),
        (
            arguments.non_negative_float,
            {"0": 0, "1e-5": 1e-5},
            {"-1e-9": "of at least 0", "nan": "must be", "inf": "must be"},
        ),
        (arguments.positive_float, {"1e-9": 1e-9}, {"0": "above 0", "": "a number"}),
        (arguments.bounded(float, 0, high=1, high_included=False), {"0": 0, "0.999": 0.999}, {"1": "below 1"}),
        (arguments.bounded(int, 0, high=3), {"3": 3}, {"4": "at most 3"}),
    ],
)
def test_numbers_out_of_bounds_say_what_the_bounds_are(convert, good, bad):
    assert {text: convert(text) for text in good} == good
    for text, message in bad.items():
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            convert(text)


def test_packages_that_a_flag_needs_are_named(monkeypatch):
    find_spec, absent = arguments.importlib.util.find_spec, {"bitsandbytes", "wandb"}
    monkeypatch.setattr(
        arguments.importlib.util, "find_spec", lambda name, *rest: None if name in absent else find_spec(name, *rest)
    )
    for flags, package in ([["--use_8bit_adam"], "bitsandbytes"], [["--report_to", "wandb"], "wandb"]):
        with pytest.raises(UserError, match=f"{flags[0]}.* needs {package}: run `pip install {package}`, or drop"):
            arguments.check_packages(train_pso_online.parse_args(REQUIRED[train_pso_online] + flags))
    arguments.check_packages(train_pso_online.parse_args([*REQUIRED[train_pso_online], "--report_to", "none"]))


def test_an_output_dir_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch):
    arguments.check_output_dir(str(tmp_path / "not" / "there"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        arguments.check_output_dir(str(tmp_path / "file" / "below"))
    monkeypatch.setattr(os, "access", lambda folder, mode: str(folder) != str(tmp_path))  # root may write anywhere
    with pytest.raises(UserError, match="may not be written to"):
        arguments.check_output_dir(str(tmp_path / "not" / "there"))
