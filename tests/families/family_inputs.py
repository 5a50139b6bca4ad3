"""What the tests of the families share."""

from functools import partial

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from pso_utils.families import Conditioning, Family
from pso_utils.families.loading import ModelInfo
from pso_utils.mdp import sample_trajectory
from pso_utils.schedules import Schedule, make_schedule


PROMPTS = ["red panda animal", "apple food"]
SIZE = {"height": 32, "width": 32}


def plain_pipeline(folder) -> StableDiffusionXLPipeline:
    """What diffusers alone makes of the folder."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, **settings) -> np.ndarray | Tensor | list:
    """What the diffusers pipeline draws of PROMPTS: images [B, H, W, 3] in [0, 1], unless told otherwise."""
    settings = {"num_inference_steps": 2, "guidance_scale": 0.0, "output_type": "np"} | settings
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(PROMPTS, generator=generators(), **settings).images


def generators(count: int = len(PROMPTS)) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def deployed_schedule(info: ModelInfo, steps: int, side: int = SIZE["height"]) -> Schedule:
    """The schedule of square images at eta 0."""
    size = {"vae_config": info.vae_config, "height": side, "width": side}
    arguments = info.family.schedule_arguments(info.scheduler, steps, **size)
    return make_schedule(info.scheduler, steps, stochastic=False, **arguments)


def sample_deployed(family: Family, schedule: Schedule, conditioning: Conditioning) -> Tensor:
    """Latents [2, C, h, w] at the end of the trajectories at eta 0, from the noise of `generators()`, at SIZE."""
    shape = family.latent_shape(**SIZE)
    noise = torch.zeros(2, schedule.num_steps + 1, *shape)
    noise[:, 0] = torch.cat([torch.randn((1, *shape), generator=generator) for generator in generators()])
    with torch.no_grad():
        return sample_trajectory(schedule, partial(family.predict, conditioning=conditioning), noise)[:, -1]


def record_calls(module, call) -> list[tuple[tuple, dict, Tensor]]:
    """(arguments, keyword arguments, output) of all calls of `module` within `call()`."""
    calls = []
    hook = module.register_forward_hook(
        lambda _, args, kwargs, output: calls.append((args, kwargs, output[0])), with_kwargs=True
    )
    call()
    hook.remove()
    return calls


def batch(family: Family, **sizes):
    """The conditioning of PROMPTS."""
    return family.collate(family.encode_prompts(PROMPTS), **SIZE | sizes)


def randomize_lora(denoiser, seed: int = 1) -> None:
    """LoRA matrices that change the model visibly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def one_line(info) -> str:
    """The message of what `pytest.raises` caught."""
    message = str(info.value)
    assert "\n" not in message
    return message
