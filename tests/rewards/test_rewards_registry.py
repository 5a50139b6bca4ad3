"""Rewards from flags, the user's own, and scoring: what passes, and what bad input says."""

import math
import os
import sys
import threading
import traceback
from importlib.machinery import PathFinder

import numpy as np
import pytest
import torch
from reward_inputs import make_images, one_line, save_clip

from pso_utils.errors import UserError
from pso_utils.rewards import CLIPReward, Rewards, RewardSpec, load_rewards, parse_rewards, register_reward, registry


@pytest.fixture
def own_modules(tmp_path, monkeypatch):
    """The current folder, with what importing from it does to `sys` undone afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


# ---- The command line ----


def test_specs_are_parsed(clip_dir):
    assert parse_rewards(["pickscore", "jpeg_compressibility=-0.1"]) == [
        RewardSpec("pickscore", 1.0, "yuvalkirstain/PickScore_v1"),
        RewardSpec("jpeg_compressibility", pytest.approx(-0.1), None),
    ]
    assert parse_rewards(["clip"]) == [RewardSpec("clip", 1.0, "openai/clip-vit-large-patch14")]
    assert parse_rewards(["clip=2", "jpeg_compressibility"], [clip_dir])[0] == RewardSpec("clip", 2.0, clip_dir)
    assert parse_rewards(["clip", "pickscore"], [f"pickscore={clip_dir}", "clip=org/model.v1"]) == [
        RewardSpec("clip", 1.0, "org/model.v1"),
        RewardSpec("pickscore", 1.0, clip_dir),
    ]


def test_a_path_may_contain_an_equals_sign(tmp_path):
    folder = save_clip(tmp_path / "rank=16")
    assert parse_rewards(["clip"], [folder])[0].model == folder


def test_a_home_folder_is_expanded(clip_dir, monkeypatch):
    monkeypatch.setenv("HOME", os.path.dirname(clip_dir))
    assert parse_rewards(["clip"], ["~/" + os.path.basename(clip_dir)])[0].model == clip_dir


@pytest.mark.parametrize(
    "specs, models, parts",
    [
        ([], None, ["no reward is given", "aesthetic, clip, jpeg_compressibility, jpeg_incompressibility, pickscore"]),
        (["clp"], None, ["unknown reward 'clp' (did you mean 'clip'?)", "pickscore", "module:function"]),
        (["beauty"], None, ["unknown reward 'beauty';", "jpeg_incompressibility"]),
        (["clip=high"], None, ["weight 'high' of reward 'clip'", "clip=0.5"]),
        (["clip="], None, ["weight '' of reward 'clip'"]),
        (["clip=nan"], None, ["finite"]),
        (["clip=inf"], None, ["finite"]),
        (["clip=1e39"], None, ["finite"]),
        (["clip=0"], None, ["other than 0"]),
        (["clip", "clip=2"], None, ["'clip' is given twice"]),
        (["clip"], ["./nowhere"], ["reward 'clip'", "--reward_model", "./nowhere does not exist", "hub id"]),
        (["clip"], ["clip=/no/where/at/all"], ["/no/where/at/all does not exist"]),
        (["clip"], [__file__], ["is a file", "pass the folder"]),
        (["clip"], ["pickscore=a/b"], ["'pickscore' is none of the rewards", "one of clip"]),
        (["pickscore"], ["pikscore=a/b"], ["did you mean 'pickscore'?"]),
        (["clip", "pickscore"], ["a/b"], ["NAME=MODEL", "clip, pickscore"]),
        (["clip"], ["a/b", "clip=c/d"], ["two models"]),
        (["jpeg_compressibility"], ["a/b"], ["take no model", "drop --reward_model"]),
        (["jpeg_compressibility"], ["jpeg_compressibility=a/b"], ["take no model", "drop --reward_model"]),
    ],
)
def test_bad_flags_say_what_to_pass(specs, models, parts):
    with pytest.raises(UserError) as info:
        parse_rewards(specs, models)
    for part in parts:
        assert part in one_line(info)


# ---- The user's own ----


def test_a_module_in_the_current_folder_is_a_reward(own_modules):
    (own_modules / "my_reward.py").write_text(
        "def score(images, prompts):\n"
        "    return [len(prompt) + image.width / 100 for image, prompt in zip(images, prompts)]\n"
    )
    specs = parse_rewards(["my_reward:score=0.5", "jpeg_compressibility"])
    rewards = load_rewards(specs, batch_size=2)
    assert rewards.names == ["my_reward:score", "jpeg_compressibility"] and rewards.weights.tolist() == [0.5, 1.0]
    scores = rewards(make_images(3), ["", "a", "bb"])
    torch.testing.assert_close(scores[0], torch.tensor([0.4, 1.4, 2.4]))


def test_a_module_beside_the_script_is_a_reward(own_modules, tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("beside")
    (folder / "beside_reward.py").write_text("def score(images, prompts):\n    return [1.0] * len(images)\n")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(folder / "train.py"), raising=False)
    assert load_rewards(parse_rewards(["beside_reward:score"]))(make_images(2), ["", ""]).tolist() == [[1.0, 1.0]]


def test_a_module_in_a_package_is_a_reward(own_modules):
    (own_modules / "my_package").mkdir()
    (own_modules / "my_package" / "__init__.py").touch()
    (own_modules / "my_package" / "inner.py").write_text("def score(images, prompts):\n    return [2] * len(images)\n")
    assert load_rewards(parse_rewards(["my_package.inner:score"]))(make_images(1), [""]).tolist() == [[2.0]]


def test_the_current_folder_does_not_shadow_installed_packages(own_modules):
    (own_modules / "tokenizers.py").touch()
    (own_modules / "plain_reward.py").write_text("def score(images, prompts):\n    return [1.0] * len(images)\n")
    parse_rewards(["plain_reward:score"])
    assert not PathFinder.find_spec("tokenizers", sys.path).origin.startswith(str(own_modules))


@pytest.mark.parametrize(
    "source, spec, parts",
    [
        (None, "absent:score", ["no module 'absent'", "absent.py"]),
        (None, "absent.inner:score", ["no module 'absent.inner'", "absent/inner.py"]),
        ("raise SystemExit(2)\n", "broken:score", ["importing broken ends the program", "SystemExit: 2", "__main__"]),
        ("def score(images, prompts): ...\n", "broken:scor", ["has no 'scor'", "did you mean 'score'?"]),
        ("import math\n", "broken:score", ["has no 'score'", "no function"]),
        ("score = 3\n", "broken:score", ["is a int, not a function", "(images, prompts)"]),
        ("def score(images): ...\n", "broken:score", ["score(images)", "must take (images, prompts)"]),
        (
            "def score(images, prompts): ...\n",
            "broken.py:score",
            ["is not module:function", "without folders and .py"],
        ),
        (None, "folder/broken.py:score", ["is not module:function", "without folders and .py"]),
        (None, "broken:", ["is not module:function"]),
        (None, ":score", ["is not module:function"]),
    ],
)
def test_a_module_that_has_no_such_reward_says_why(own_modules, source, spec, parts):
    if source is not None:
        (own_modules / "broken.py").write_text(source)
    with pytest.raises(UserError) as info:
        parse_rewards([spec])
    for part in parts:
        assert part in one_line(info)


@pytest.mark.parametrize(
    "source, error_class, part",
    [
        ("import not_there\n", ModuleNotFoundError, "'not_there'"),
        ("import broken_too\n", ModuleNotFoundError, "'broken_too'"),
        ("from math import not_there\n", ImportError, "'not_there'"),
        ("def score(\n", SyntaxError, "broken.py"),
        ("1 / 0\n", ZeroDivisionError, "division by zero"),
        ("raise ValueError('mine')\n", ValueError, "mine"),
    ],
)
def test_a_module_that_fails_on_import_keeps_its_traceback(own_modules, source, error_class, part):
    (own_modules / "broken.py").write_text(source)
    with pytest.raises(error_class) as info:
        parse_rewards(["broken:score"])
    printed = "".join(traceback.format_exception(info.value))
    assert part in str(info.value) and f'File "{own_modules / "broken.py"}", line 1' in printed


# ---- Scoring ----


def make_rewards(*functions, batch_size=8):
    specs = [RewardSpec(f"mine:f{i}", 1.0, None) for i in range(len(functions))]
    return Rewards(functions, specs, batch_size=batch_size)


@pytest.mark.parametrize(
    "convert",
    [
        list,
        tuple,
        np.array,
        torch.tensor,
        lambda values: torch.tensor(values, dtype=torch.float64),
        lambda values: torch.tensor(values, dtype=torch.bfloat16),
        lambda values: torch.tensor(values, dtype=torch.float32, requires_grad=True),
        lambda values: [torch.tensor(value) for value in values],
        lambda values: [np.float64(value) for value in values],
        lambda values: np.array(values, dtype=np.int64),
    ],
)
def test_lists_arrays_and_tensors_are_scores(convert):
    scores = make_rewards(lambda images, prompts: convert([float(len(prompt)) for prompt in prompts]))(
        make_images(3), ["", "a", "bb"]
    )
    assert scores.dtype == torch.float32 and not scores.requires_grad
    assert scores.tolist() == [[0.0, 1.0, 2.0]]


@pytest.mark.parametrize(
    "result, parts",
    [
        (1.0, ["returned shape []"]),
        ([1.0], ["returned shape [1]"]),
        (torch.zeros(3, 1), ["returned shape [3, 1]"]),
        ([1.0, math.nan, math.inf], ["returned nan for the prompt 'b'", "2 of 3"]),
        (torch.tensor([0.0, 1.0, 1e300], dtype=torch.float64), ["returned inf for the prompt 'c'", "1 of 3"]),
        (None, ["returned None"]),
        (["a", "b", "c"], ["returned a list of str"]),
        ([[1.0], [1.0, 2.0], [3.0]], ["returned a list of list"]),
        ({"score": 1}, ["returned a dict"]),
        (np.array([1j, 1, 1]), ["returned a ndarray"]),
    ],
)
def test_other_results_are_errors_that_say_what_to_return(result, parts):
    with pytest.raises(UserError) as info:
        make_rewards(lambda images, prompts: result)(make_images(3), ["a", "b", "c"])
    for part in [*parts, "reward 'mine:f0'", "float tensor of shape [3]"]:
        assert part in one_line(info)


@pytest.mark.parametrize("error", [KeyError("a\nb"), OSError("no file"), torch.OutOfMemoryError("CUDA out of memory")])
def test_an_exception_of_a_reward_keeps_its_traceback_and_says_whose_it_is(error):
    def inner():
        raise error

    def score(images, prompts):
        inner()

    with pytest.raises(type(error)) as info:
        make_rewards(lambda images, prompts: [0.0] * len(images), score)(make_images(1), [""])
    assert info.value is error and error.__cause__ is None and error.__context__ is None
    assert [entry.name for entry in info.traceback[-2:]] == ["score", "inner"]
    (note,) = error.__notes__
    assert "reward 'mine:f1' raised this" in note and "float tensor of shape [1]" in note
    assert note in "".join(traceback.format_exception(error))


def test_a_reward_that_cannot_be_called_so_says_whose_it_is():
    with pytest.raises(TypeError) as info:
        make_rewards(lambda images: [1.0])(make_images(1), [""])
    assert "reward 'mine:f0'" in info.value.__notes__[0]


@pytest.mark.parametrize("code", [0, None, 1, "enough"])
def test_a_reward_that_ends_the_program_is_an_error(code):
    def score(images, prompts):
        sys.exit(code)

    with pytest.raises(UserError) as info:
        make_rewards(score)(make_images(1), [""])
    line = score.__code__.co_firstlineno + 1
    assert f"reward 'mine:f0' ends the program (SystemExit: {code}, {__file__}, line {line})" in one_line(info)


def test_what_a_reward_does_to_its_images_is_not_seen_by_others():
    images, before = make_images(3), [image.tobytes() for image in make_images(3)]

    def paint(images, prompts):
        for image in images:
            image.paste((255, 0, 0), (0, 0, *image.size))
        return [0.0] * len(images)

    seen = []
    make_rewards(paint, lambda images, prompts: seen.extend(images) or [0.0] * len(images))(images, [""] * 3)
    assert [image.tobytes() for image in images] == [image.tobytes() for image in seen] == before


def test_a_reward_that_hangs_is_named_in_the_log_after_a_minute(monkeypatch):
    assert registry.SLOW_SECONDS == 60
    monkeypatch.setattr(registry, "SLOW_SECONDS", 0.01)
    is_told, told = threading.Event(), []
    monkeypatch.setattr(registry.logger, "warning", lambda message: told.append(message) or is_told.set())

    def score(images, prompts):
        assert is_told.wait(timeout=30)
        return [0.0] * len(images)

    make_rewards(score)(make_images(2), ["", ""])
    assert "reward 'mine:f0' has been scoring 2 images for over 0.01 seconds" in told
    monkeypatch.setattr(registry, "SLOW_SECONDS", 60)
    make_rewards(lambda images, prompts: [0.0])(make_images(1), [""])
    for timer in threading.enumerate():
        if isinstance(timer, threading.Timer):
            timer.join(timeout=30)
            assert not timer.is_alive()  # it was cancelled
    assert len(told) == 1


def test_an_interrupt_is_not_swallowed():
    def score(images, prompts):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_rewards(score)(make_images(1), [""])


def test_rewards_are_scored_in_batches_in_order_and_without_gradient():
    sizes = []

    def score(images, prompts):
        sizes.append((len(images), len(prompts)))
        assert not torch.is_grad_enabled()
        return [float(prompt) for prompt in prompts]

    rewards = make_rewards(score, lambda images, prompts: [-float(prompt) for prompt in prompts], batch_size=3)
    scores = rewards(make_images(7), [str(index) for index in range(7)])
    assert sizes == [(3, 3), (3, 3), (1, 1)]
    assert scores.tolist() == [list(range(7)), [-index for index in range(7)]]
    assert rewards([], []).shape == (2, 0)
    with pytest.raises(ValueError, match="2 images and 1 prompts"):
        rewards(make_images(2), ["a"])


def test_to_moves_what_can_be_moved(clip_dir):
    class Movable:
        device = None

        def __call__(self, images, prompts):
            return [0.0] * len(images)

        def to(self, device):
            self.device = device

    movable, clip = Movable(), CLIPReward(clip_dir)
    rewards = make_rewards(lambda images, prompts: [0.0] * len(images), movable, clip)
    assert rewards.to("meta") is rewards
    assert movable.device == "meta" and clip.model.device.type == "meta"


def test_a_reward_is_added_by_one_registration(monkeypatch):
    monkeypatch.setattr(registry, "REWARDS", dict(registry.REWARDS))
    checked = []

    @register_reward("darkness", default_model="some/model", check_model=checked.append)
    def darkness(model, cache_dir):
        return lambda images, prompts: [float(len(f"{model}{cache_dir}"))] * len(images)

    specs = parse_rewards(["darkness=2"])
    assert specs == [RewardSpec("darkness", 2.0, "some/model")] and checked == ["some/model"]
    assert load_rewards(specs, cache_dir="cache")(make_images(1), [""]).item() == len("some/modelcache")
    parse_rewards(["darkness"], [os.path.dirname(__file__)])
    assert checked == ["some/model", os.path.dirname(__file__)]
    with pytest.raises(ValueError, match="taken"):
        register_reward("darkness")


@pytest.mark.parametrize(
    "raised, expected, message",
    [
        (UserError("pass another"), UserError, "reward 'mine': pass another"),
        (
            OSError("not on the hub\nor elsewhere"),
            UserError,
            "reward 'mine': cannot load 'some/model': OSError: not on the hub;",
        ),
        (ImportError("needs torchvision"), ImportError, "needs torchvision"),
        (ValueError("a bug"), ValueError, "a bug"),
    ],
)
def test_what_a_factory_raises_is_one_line_only_where_the_user_can_mend_it(monkeypatch, raised, expected, message):
    monkeypatch.setattr(registry, "REWARDS", dict(registry.REWARDS))

    @register_reward("mine", default_model="some/model")
    def mine(model, cache_dir):
        raise raised

    with pytest.raises(expected) as info:
        load_rewards(parse_rewards(["mine"]))
    assert one_line(info).startswith(message)
    assert (info.value is raised) == (expected is not UserError)


def test_a_file_that_a_reward_without_a_model_misses_is_no_missing_model(monkeypatch):
    monkeypatch.setattr(registry, "REWARDS", dict(registry.REWARDS))

    @register_reward("mine")
    def mine(model, cache_dir):
        raise FileNotFoundError("weights.txt")

    with pytest.raises(FileNotFoundError):
        load_rewards(parse_rewards(["mine"]))
