"""The flags: their help, and the checks that need nothing but them."""

import argparse
import os
import re
import shlex
from collections.abc import Callable
from types import ModuleType

import pytest

import train_pso_lora_sdxl
import train_pso_online
from pso_utils.errors import UserError
from pso_utils.evaluate import plan
from pso_utils.run import arguments
from pso_utils.run.arguments import FLAGS_ELSEWHERE


SCRIPTS = [train_pso_online, train_pso_lora_sdxl]
REQUIRED = {
    train_pso_online: ["--pretrained_model_name_or_path", "model", "--reward", "clip"],
    train_pso_lora_sdxl: ["--pretrained_model_name_or_path", "model", "--task", "style"],
}


@pytest.fixture
def help_of(capsys, monkeypatch) -> Callable[[ModuleType], str]:
    """A script's help, one flag a line."""

    def read(script: ModuleType) -> str:
        monkeypatch.setenv("COLUMNS", "10000")
        with pytest.raises(SystemExit) as stop:
            script.parse_args(["--help"])
        assert stop.value.code == 0
        return capsys.readouterr().out

    return read


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_defaults_that_are_values(script, help_of):
    text = help_of(script)
    for nothing in ("(default: None)", "(default: [])", "(default: False)"):
        assert nothing not in text
    assert "(default: 1e-05)" in text
    values = vars(script.parse_args(REQUIRED[script]))
    assert all(f"--{name}" in text for name in values)


def test_help_names_the_defaults_that_depend_on_task_and_weighting(help_of):
    flags = {text.split()[0]: text for text in help_of(train_pso_lora_sdxl).split("\n  --")}
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
    "flag, remedy",
    [
        ("--network_dim=8", "pass --rank"),
        ("--validation_prompt", "pass --validation_prompts"),
        ("--snr_gamma", "pass --weighting"),
        ("--train_text_encoder", "are not trained"),
        ("--learning-rate", "did you mean --learning_rate?"),
        ("--gradient_acumulation_steps", "did you mean --gradient_accumulation_steps?"),
    ],
)
@pytest.mark.parametrize("script", SCRIPTS)
def test_other_trainers_flags_and_slips_are_told_what_takes_their_place(script, capsys, flag, remedy):
    with pytest.raises(SystemExit) as stop:
        script.parse_args([*REQUIRED[script], flag, "1"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and flag in error and remedy in error


def test_what_takes_the_place_of_other_flags_is_one_of_a_script(help_of):
    named = set(re.findall(r"--\w+", " ".join(FLAGS_ELSEWHERE.values())))
    flags = {flag for script in SCRIPTS for flag in re.findall(r"\n  (--\w+)", help_of(script))}
    assert named <= flags and not {f"--{name}" for name in FLAGS_ELSEWHERE} & flags


def test_the_evaluation_names_no_flag_that_only_training_has(capsys):
    required = ["--pretrained_model_name_or_path", "model", "--lora", "a=b", "--reward", "clip"]
    for flag, remedy, is_told in (("--network_dim", "--rank", False), ("--xformers", "--enable_xformers", True)):
        with pytest.raises(SystemExit):
            plan.parse_args([*required, flag])
        assert (remedy in capsys.readouterr().err) == is_told


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_begins_with_one_line_of_usage_and_ends_with_an_example_that_is_taken(script, help_of):
    text = help_of(script)
    assert re.match(r"usage: \S+ \[flags\]\n\n", text)
    example = shlex.split(" ".join(text.partition("Example: ")[2].split()))
    assert script.parse_args(example[example.index(f"{script.__name__}.py") + 1 :]).output_dir


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
