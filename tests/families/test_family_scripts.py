"""Both scripts and the evaluation with a tiny pipeline of each family, and the code of the model card that they
write."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

import train_pso_lora_sdxl
import train_pso_online
from pso_utils.evaluate import __main__ as evaluate
from pso_utils.families import Deployment, find_family
from pso_utils.families.loading import ModelSource, load_pipeline
from tests.conftest import build_pipeline
from tests.families.cases import CASES, PROMPTS, find_case
from tests.script_runs import error_line, metrics, to_flags, weights


pytestmark = pytest.mark.usefixtures("fresh_state")


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    return prepare(find_case(request.param), tmp_path_factory.mktemp(request.param))


def prepare(case, folder):
    """A family's case, with a folder that has its pipeline, prompts and captioned images."""
    case.folder = folder
    case.build().save_pretrained(folder / "pipeline")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "images").mkdir()
    for index in range(len(PROMPTS)):
        pixels = np.random.default_rng(index).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
    rows = [json.dumps({"file_name": f"{index}.png", "text": prompt}) for index, prompt in enumerate(PROMPTS)]
    (folder / "images" / "metadata.jsonl").write_text("\n".join(rows))
    case.flags = {"pretrained_model_name_or_path": folder / "pipeline", "resolution": case.SIZES[0][0]}
    case.flags |= {"num_inference_steps": case.STEPS[0], **case.FLAGS}
    return case


def run_and_resume(main, flags: dict, folder):
    """Two steps into `folder`/whole, with a checkpoint after the first, and from that again into `folder`/resumed."""
    flags |= {"max_train_steps": 2, "checkpointing_steps": 1, "num_validation_images": 1, "report_to": "none"}
    flags |= {"learning_rate": 1e-2, "rank": 2}
    main(to_flags(flags | {"output_dir": folder / "whole"}))
    AcceleratorState._reset_state(reset_partial_state=True)
    shutil.copytree(folder / "whole" / "checkpoint-1", folder / "resumed" / "checkpoint-1")
    main(to_flags(flags | {"output_dir": folder / "resumed", "resume_from_checkpoint": "latest"}))
    AcceleratorState._reset_state(reset_partial_state=True)
    before, after = metrics(folder / "whole"), metrics(folder / "resumed")
    assert [line for line in before if line["step"] == 2] == [line for line in after if line["step"] == 2]
    ours, theirs = weights(folder / "whole"), weights(folder / "resumed")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert any(value.any() for key, value in ours.items() if "lora_B" in key or "lora.up" in key)


def run_card(folder) -> Image.Image:
    """What the code of the model card draws."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    namespace = {}
    exec(code, namespace)
    return namespace["image"]


def test_online_trains_resumes_and_its_card_draws(case, tmp_path):
    flags = {"prompts": case.folder / "prompts.txt", "reward": "jpeg_compressibility", "sample_batches_per_epoch": 1}
    run_and_resume(train_pso_online.main, case.flags | flags, tmp_path)
    image = np.asarray(run_card(tmp_path / "whole"))
    assert image.shape == (*case.SIZES[0][:1] * 2, 3) and image.std() > 1


def test_offline_trains_resumes_and_is_evaluated(case, tmp_path):
    flags = {"task": "style", "train_data_dir": case.folder / "images", "train_batch_size": 1}
    run_and_resume(train_pso_lora_sdxl.main, case.flags | flags, tmp_path)
    flags = {"prompts": case.folder / "prompts.txt", "lora": f"tuned={tmp_path / 'whole'}"}
    flags |= {"reward": "jpeg_compressibility", "images_per_prompt": 1, "output_dir": tmp_path / "evaluation"}
    evaluate.main(to_flags(case.flags | flags))
    images = [
        np.asarray(Image.open(path)) for path in sorted((tmp_path / "evaluation" / "images").rglob("00000-00.png"))
    ]
    assert len(images) == 2 and (images[0] != images[1]).any()


# ---- What all families share ----


@pytest.fixture(scope="module")
def z_image(tmp_path_factory):
    return prepare(find_case("z_image"), tmp_path_factory.mktemp("z_image"))


def test_lora_path_goes_on_from_a_lora_of_ones_own(z_image, tmp_path, capsys):
    flags = z_image.flags | {"prompts": z_image.folder / "prompts.txt", "reward": "jpeg_compressibility"}
    flags |= {"sample_batches_per_epoch": 1, "num_validation_images": 0, "report_to": "none", "max_train_steps": 1}
    first, second = flags | {"output_dir": tmp_path / "first"}, flags | {"output_dir": tmp_path / "second"}
    train_pso_online.main(to_flags(first | {"rank": 3, "lora_alpha": 2.0, "learning_rate": 1e-2}))
    AcceleratorState._reset_state(reset_partial_state=True)
    train_pso_online.main(to_flags(second | {"lora_path": tmp_path / "first", "learning_rate": 0.0}))
    ours, theirs = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert "| rank | 3 |" in (tmp_path / "second" / "README.md").read_text()
    with pytest.raises(SystemExit):
        train_pso_online.main(to_flags(second | {"lora_path": tmp_path / "first", "rank": 4}))
    assert error_line(capsys.readouterr().err) == "error: --rank is that of the LoRA in --lora_path: drop it"


def test_a_quantized_base_is_trained_on_and_evaluated(z_image, tmp_path):
    flags = z_image.flags | {"prompts": z_image.folder / "prompts.txt", "reward": "jpeg_compressibility"}
    flags |= {"quantize": "nf4"}
    train = {"sample_batches_per_epoch": 1, "report_to": "none", "max_train_steps": 1, "output_dir": tmp_path / "lora"}
    train_pso_online.main(to_flags(flags | train | {"learning_rate": 1e-2}))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert "| quantize | nf4 |" in (tmp_path / "lora" / "README.md").read_text()
    settings = {"lora": f"tuned={tmp_path / 'lora'}", "images_per_prompt": 1, "output_dir": tmp_path / "evaluation"}
    evaluate.main(to_flags(flags | settings))
    assert "quantize: nf4" in json.loads((tmp_path / "evaluation" / "results.json").read_text())["settings"]


STOCHASTIC = '{"stochastic_sampling": true}'


def test_a_stochastic_deployment_draws_the_same_noise_again(z_image, tmp_path):
    """Diffusers takes the steps' noise from the global generator: in validation, before and after, and in the card."""
    flags = z_image.flags | {"prompts": z_image.folder / "prompts.txt", "reward": "jpeg_compressibility"}
    flags |= {"sample_batches_per_epoch": 1, "report_to": "none", "max_train_steps": 1, "validation_steps": 1}
    flags |= {"learning_rate": 0.0, "num_validation_images": 2, "scheduler_config": STOCHASTIC}
    train_pso_online.main(to_flags(flags | {"output_dir": tmp_path}))
    before, after = (Image.open(tmp_path / "validation" / f"step-00000{n}.png") for n in (0, 1))
    assert np.array_equal(np.asarray(before), np.asarray(after))
    source = ModelSource(str(z_image.folder / "pipeline"), scheduler_config=json.loads(STOCHASTIC))
    pipeline = load_pipeline(source)
    family = find_family(type(pipeline).__name__, "tiny")(pipeline)
    deployment = Deployment(z_image.STEPS[0], None, None, *z_image.SIZES[0][:1] * 2)
    conditioning = family.collate(family.encode_prompts([PROMPTS[0]] * 3), deployment.height, deployment.width)
    latents = family.draw_latents(conditioning, [0, 1, 0], deployment=deployment, batch_size=3)
    assert torch.equal(latents[0], latents[2]) and not torch.allclose(latents[0], latents[1], rtol=0.1)
    (image,) = family.decode_latents(latents[:1])
    assert np.abs(np.asarray(run_card(tmp_path), int) - np.asarray(image, int)).max() <= 1


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"eta": 0.5},
            "--eta is the noise of trained transitions, and this run has none: drop it, or pass --weighting",
        ),
        ({"logging_dir": "../elsewhere"}, "--logging_dir ../elsewhere is not inside --output_dir"),
        ({"hub_public": True}, "--hub_public does nothing without --push_to_hub"),
        ({"pretrained_vae_model_name_or_path": "VAE"}, "pass an AutoencoderKL of 16"),
    ],
    ids=str,
)
def test_what_would_do_nothing_or_does_not_fit_is_refused(z_image, tmp_path, capsys, changes, message):
    flags = z_image.flags | {"task": "style", "train_data_dir": z_image.folder / "images", "output_dir": tmp_path}
    if changes.get("pretrained_vae_model_name_or_path"):
        build_pipeline().vae.save_pretrained(tmp_path / "vae")  # SDXL's, of 4 channels
        changes = {"pretrained_vae_model_name_or_path": tmp_path / "vae"}
    with pytest.raises(SystemExit):
        train_pso_lora_sdxl.main(to_flags(flags | changes))
    assert message in error_line(capsys.readouterr().err)


def test_the_plain_loss_needs_training_timesteps(tmp_path, capsys):
    case = prepare(find_case("sana_sprint"), tmp_path)
    flags = case.flags | {"task": "style", "train_data_dir": tmp_path / "images", "loss": "diffusion"}
    with pytest.raises(SystemExit):
        train_pso_lora_sdxl.main(to_flags(flags | {"output_dir": tmp_path / "out"}))
    message = "error: --loss diffusion: SCMScheduler has no training timesteps to draw: pass sigmoid"
    assert error_line(capsys.readouterr().err) == message
