"""The aesthetic score against its published formula; and what bad heads say."""

import pytest
import torch
from reward_inputs import make_images, one_line
from safetensors.torch import save_file
from transformers import CLIPImageProcessorPil, CLIPModel

from pso_utils.errors import UserError
from pso_utils.rewards import load_rewards, parse_rewards


LINEAR_HEAD = {"weight": (1, 8), "bias": (1,)}
LAYERS = zip((0, 2, 4, 6, 7), ((8, 16), (16, 12), (12, 6), (6, 4), (4, 1)))  # as published, with dropout at 1, 3, 5
DEEP_HEAD = {
    f"layers.{number}.{name}": shape
    for number, (width, outputs) in LAYERS
    for name, shape in {"weight": (outputs, width), "bias": (outputs,)}.items()
}


def save_head(path, shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    head = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(head, path) if path.suffix == ".safetensors" else torch.save(head, path)
    return head


@pytest.mark.parametrize("shapes", [LINEAR_HEAD, DEEP_HEAD], ids=["linear", "perceptron"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_aesthetic_is_the_published_formula(clip_dir, tmp_path, shapes, suffix):
    path = tmp_path / f"sac+logos+ava1{suffix}"
    head = save_head(path, shapes)
    images = make_images(4)
    scores = load_rewards(parse_rewards(["aesthetic"], [f"aesthetic={path},{clip_dir}"]))(images, [""] * 4)[0]

    model = CLIPModel.from_pretrained(clip_dir).eval()
    pixel_values = CLIPImageProcessorPil.from_pretrained(clip_dir)(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        embedding = model.visual_projection(model.vision_model(pixel_values).pooler_output)
        values = embedding / embedding.norm(dim=-1, keepdim=True)
        if shapes is LINEAR_HEAD:
            expected = values @ head["weight"].T + head["bias"]
        else:
            perceptron = torch.nn.Sequential(
                torch.nn.Linear(8, 16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 12), torch.nn.Dropout(0.2),
                torch.nn.Linear(12, 6), torch.nn.Dropout(0.1), torch.nn.Linear(6, 4), torch.nn.Linear(4, 1),
            )  # fmt: skip
            perceptron.load_state_dict({name.removeprefix("layers."): value for name, value in head.items()})
            expected = perceptron.eval()(values)
    torch.testing.assert_close(scores, expected.squeeze(1), rtol=1e-4, atol=1e-4)
    assert scores.unique().numel() == 4


@pytest.mark.parametrize(
    "source, part",
    [
        ("nowhere.pth", "no file 'nowhere.pth'"),
        ("/no/where:head.pth", "/no/where does not exist"),
        ("some/repository", "aesthetic=HEAD,CLIP"),  # which of its files is the head?
        ("{head},{folder}", "config.json' cannot be read"),
        ("{head},/no/where", "/no/where does not exist"),
    ],
)
def test_a_missing_part_of_aesthetic_is_found_before_loading(tmp_path, source, part):
    save_head(tmp_path / "head.pth", LINEAR_HEAD)
    with pytest.raises(UserError) as info:
        parse_rewards(["aesthetic"], [f"aesthetic={source.format(head=tmp_path / 'head.pth', folder=tmp_path)}"])
    assert part in one_line(info) and "reward 'aesthetic'" in one_line(info)


@pytest.mark.parametrize(
    "source, part",
    [
        ("{folder}:absent.pth", "absent.pth does not exist"),
        ("{head},no-such/clip", "cannot load 'no-such/clip'"),
        ("{pickle},{clip}", "cannot be read as weights alone"),
    ],
)
def test_a_part_of_aesthetic_that_cannot_be_loaded_is_one_line(clip_dir, tmp_path, source, part):
    save_head(tmp_path / "head.pth", LINEAR_HEAD)
    torch.save(print, tmp_path / "code.pth")  # code, not tensors
    paths = {"folder": tmp_path, "head": tmp_path / "head.pth", "pickle": tmp_path / "code.pth", "clip": clip_dir}
    specs = parse_rewards(["aesthetic"], [f"aesthetic={source.format(**paths)}"])
    with pytest.raises(UserError) as info:
        load_rewards(specs)
    assert part in one_line(info) and "reward 'aesthetic'" in one_line(info)


def test_the_path_of_a_head_may_contain_a_comma(tmp_path):
    path = tmp_path / "head,1.pth"
    save_head(path, LINEAR_HEAD)
    assert parse_rewards(["aesthetic"], [str(path)])[0].model == str(path)


def test_a_head_of_another_clip_is_an_error(clip_dir, tmp_path):
    save_head(tmp_path / "head.pth", {"weight": (1, 768), "bias": (1,)})
    with pytest.raises(UserError) as info:
        load_rewards(parse_rewards(["aesthetic"], [f"aesthetic={tmp_path / 'head.pth'},{clip_dir}"]))
    assert "(1, 768)" in one_line(info) and "embedding of 8" in one_line(info)


def test_aesthetic_takes_a_file_of_the_hub():
    assert parse_rewards(["aesthetic"])[0].model == "trl-lib/ddpo-aesthetic-predictor:aesthetic-model.pth"
    assert parse_rewards(["aesthetic"], ["a/b:c.pth,d/e"])[0].model == "a/b:c.pth,d/e"
