"""The README.md beside a trained LoRA: how to load it, and with which scheduler, steps, eta and guidance."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffusers import SchedulerMixin
from diffusers.utils.hub_utils import populate_model_card
from huggingface_hub import ModelCard, ModelCardData

from .sdxl import split_source


TAGS = ["text-to-image", "diffusers", "diffusers-training", "lora", "template:sd-lora", "stable-diffusion-xl", "pso"]


def scheduler_code(scheduler: SchedulerMixin) -> str:
    """The call that makes this scheduler: its class, and each config value that is not the class's default."""
    parameters = inspect.signature(type(scheduler).__init__).parameters
    values = {name: scheduler.config[name] for name in parameters if name in scheduler.config}
    arguments = [f"{name}={value!r}" for name, value in values.items() if value != parameters[name].default]
    return f"{type(scheduler).__name__}({', '.join(arguments)})"


def usage_snippet(
    *,
    base_model: str,
    lora: str,
    scheduler: SchedulerMixin,
    prompt: str,
    num_inference_steps: int | None = None,
    timesteps: Sequence[int] | None = None,
    eta: float | None = None,
    guidance_scale: float = 0.0,
    resolution: int | None = None,
    revision: str | None = None,
    variant: str | None = None,
    vae: str | None = None,
    distilled_unet: str | None = None,
    distillation_lora: str | None = None,
) -> str:
    """Python that loads the base model, what was put into it before training, the scheduler of the deployment and the
    LoRA, and draws one image (`image`, by `pipe`) as training's validation does."""
    imports = {"diffusers": {type(scheduler).__name__, "StableDiffusionXLPipeline"}}
    parts, before, after = [], [], []
    if vae is not None:
        imports["diffusers"].add("AutoencoderKL")
        before.append(f"vae = AutoencoderKL.from_pretrained({vae!r}, dtype=dtype)")
        parts.append("vae=vae")
    if distilled_unet is not None:
        location, filename = split_source(distilled_unet)
        if filename is None:
            imports["diffusers"].add("UNet2DConditionModel")
            before.append(f"unet = UNet2DConditionModel.from_pretrained({location!r}, dtype=dtype)")
            parts.append("unet=unet")
        else:
            if Path(location).is_dir():
                path = repr(str(Path(location, filename)))
            else:
                imports["huggingface_hub"] = {"hf_hub_download"}
                path = f"hf_hub_download({location!r}, {filename!r})"
            if filename.endswith(".safetensors"):
                imports["safetensors.torch"] = {"load_file"}
                after.append(f"pipe.unet.load_state_dict(load_file({path}))")
            else:
                after.append(f'pipe.unet.load_state_dict(torch.load({path}, map_location="cpu", weights_only=True))')
    if distillation_lora is not None:
        location, filename = split_source(distillation_lora)
        weight_name = "" if filename is None else f", weight_name={filename!r}"
        after += [
            f"pipe.load_lora_weights({location!r}{weight_name})",
            'pipe.fuse_lora(components=["unet"])',
            "pipe.unload_lora_weights()",
        ]
    if revision is not None:
        parts.append(f"revision={revision!r}")
    if variant is not None:
        parts.append(f"variant={variant!r}")
    call = [
        repr(prompt),
        f"timesteps={list(timesteps)}" if timesteps else f"num_inference_steps={num_inference_steps}",
    ]
    call += [f"guidance_scale={guidance_scale}"] + ([] if eta is None else [f"eta={eta}"])
    call += [] if resolution is None else [f"height={resolution}", f"width={resolution}"]
    call.append("generator=torch.Generator().manual_seed(0)")
    lines = [
        "import torch",
        *(f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(imports.items())),
        "",
        'device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)',
        *before,
        f"pipe = StableDiffusionXLPipeline.from_pretrained({', '.join([repr(base_model), *parts, 'dtype=dtype'])})",
        *after,
        f"pipe.scheduler = {scheduler_code(scheduler)}",
        f"pipe.load_lora_weights({lora!r})",
        "pipe.to(device)",
        "image = pipe(",
        *(f"    {argument}," for argument in call),
        ").images[0]",
    ]
    return "\n".join(lines)


def save_model_card(
    output_dir,
    *,
    base_model: str,
    scheduler: SchedulerMixin,
    prompt: str,
    hub_model_id: str | None = None,
    training: Mapping[str, object] | None = None,
    images: Sequence[tuple[str, str]] = (),
    license: str | None = None,
    **usage,
) -> Path:
    """Writes `output_dir/README.md`.

    Args:
        scheduler: that of the deployment, as the pipeline holds it; the card names its class and settings.
        prompt: the example's.
        hub_model_id: where the LoRA will be; else the card loads it from `output_dir`.
        training: facts of the run (reward, beta, learning rate, steps ...), written as a table in this order.
        images: (caption, file name relative to `output_dir`) of validation images.
        usage: the other arguments of `usage_snippet`.
    """
    lora = hub_model_id or str(output_dir)
    snippet = usage_snippet(base_model=base_model, lora=lora, scheduler=scheduler, prompt=prompt, **usage)
    on_hub = not Path(base_model).exists()
    data = ModelCardData(
        license=license,
        library_name="diffusers",
        base_model=base_model if on_hub else None,  # the hub takes ids only
        widget=[{"text": caption, "output": {"url": name}} for caption, name in images] or None,
    )
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {Path(lora).name}",
        f"LoRA weights for {f'[{base_model}](https://huggingface.co/{base_model})' if on_hub else base_model}, tuned "
        "by [Pairwise Sample Optimization](https://arxiv.org/abs/2410.03190) (PSO). They are meant for the scheduler "
        "and the few steps below.",
        *(f"![{caption}]({name})" for caption, name in images),
        f"## Use\n\n```python\n{snippet}\n```",
    ]
    if training:
        rows = "\n".join(f"| {name} | {value} |" for name, value in training.items())
        sections.append(f"## Training\n\n| setting | value |\n|---|---|\n{rows}")
    card = populate_model_card(ModelCard("\n\n".join(sections) + "\n"), tags=TAGS)
    path = Path(output_dir, "README.md")
    card.save(path)
    return path
