"""The README.md beside a trained LoRA: how to load it, and with which scheduler, steps, eta and guidance."""

import argparse
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffusers import SchedulerMixin
from diffusers.utils.hub_utils import populate_model_card
from huggingface_hub import ModelCard, ModelCardData

from pso_utils.families import Deployment, Family
from pso_utils.families.base import step_noise_seed
from pso_utils.families.loading import ModelSource
from pso_utils.families.lora_export import export_name
from pso_utils.run.comfyui import ComfySettings
from pso_utils.run.models import base_model_name, model_source
from pso_utils.schedules import draws_global_noise
from pso_utils.sources import split_source


TAGS = ["text-to-image", "diffusers", "diffusers-training", "lora", "template:sd-lora", "pso"]


def scheduler_code(scheduler: SchedulerMixin) -> str:
    """The call that makes this scheduler: its class, and each config value that is not the class's default."""
    parameters = inspect.signature(type(scheduler).__init__).parameters
    values = {name: scheduler.config[name] for name in parameters if name in scheduler.config}
    arguments = [f"{name}={value!r}" for name, value in values.items() if value != parameters[name].default]
    return f"{type(scheduler).__name__}({', '.join(arguments)})"


def usage_snippet(
    source: ModelSource, family: Family, deployment: Deployment, *, lora: str, prompt: str, is_public: bool = False
) -> str:
    """Python that loads the base model, what was put into it before training, the pipeline's scheduler and the LoRA,
    and draws one image (`image`, by `pipe`) as training's validation does. With `is_public`, of what is local only the
    names."""
    local = []  # whose paths the reader must fill in

    def shown(location: str, filename: str | None = None) -> str:
        path = Path(location).expanduser()
        if not path.exists():
            return location
        if not is_public:
            return str(Path(location, filename)) if filename else location
        local.append(filename or path.resolve().name)
        return local[-1]

    pipeline_class, part = family.pipeline_class.__name__, family.denoiser_name
    imports = {"diffusers": {pipeline_class}}
    parts, before, after = [], [], []
    if source.vae is not None:
        vae_class = family.vae_class.__name__
        imports["diffusers"].add(vae_class)
        before.append(f"vae = {vae_class}.from_pretrained({shown(source.vae)!r}, dtype=dtype)")
        parts.append("vae=vae")
    if source.distilled_denoiser is not None:
        location, filename = split_source(source.distilled_denoiser)
        if filename is None:
            denoiser_class = family.denoiser_class.__name__
            imports["diffusers"].add(denoiser_class)
            before.append(f"{part} = {denoiser_class}.from_pretrained({shown(location)!r}, dtype=dtype)")
            parts.append(f"{part}={part}")
        else:
            if Path(location).is_dir():
                path = repr(shown(location, filename))
            else:
                imports["huggingface_hub"] = {"hf_hub_download"}
                path = f"hf_hub_download({location!r}, {filename!r})"
            if filename.endswith(".safetensors"):
                imports["safetensors.torch"] = {"load_file"}
                weights = f"load_file({path})"
            else:
                weights = f'torch.load({path}, map_location="cpu", weights_only=True)'
            after.append(f"pipe.{part}.load_state_dict({weights})")
    if source.distillation_lora is not None:
        location, filename = split_source(source.distillation_lora)
        if is_public and filename is not None and Path(location).is_dir():
            location, filename = shown(location, filename), None
        else:
            location = shown(location)
        scale = "" if source.distillation_lora_scale == 1 else f", lora_scale={source.distillation_lora_scale}"
        weight_name = "" if filename is None else f", weight_name={filename!r}"
        after += [
            f"pipe.load_lora_weights({location!r}{weight_name})",
            f'pipe.fuse_lora(components=["{part}"]{scale})',
            "pipe.unload_lora_weights()",
        ]
    if source.revision is not None:
        parts.append(f"revision={source.revision!r}")
    if source.variant is not None:
        parts.append(f"variant={source.variant!r}")
    parts += [f"{name}=None" for name in family.absent_parts]
    scheduler = family.pipeline.scheduler
    imports["diffusers"].add(type(scheduler).__name__)
    call = [f"prompt={prompt!r}", *(f"{name}={value!r}" for name, value in family.call_arguments(deployment).items())]
    call.append("generator=torch.Generator().manual_seed(0)")
    base = repr(shown(source.pretrained_model_name_or_path))
    lines = [
        *([f"# {', '.join(local)}: the trainer's own, replace by your path"] if local else []),
        "import torch",
        *(f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(imports.items())),
        "",
        f'device, dtype = ("cuda", torch.{family.card_dtype}) if torch.cuda.is_available() else ("cpu", torch.float32)',
        *before,
        f"pipe = {pipeline_class}.from_pretrained({', '.join([base, *parts, 'dtype=dtype'])})",
        *after,
        f"pipe.scheduler = {scheduler_code(scheduler)}",
        f"pipe.load_lora_weights({lora!r})",
        "pipe.to(device)",
        *([f"torch.manual_seed({step_noise_seed(0)})  # of the steps' noise"] if draws_global_noise(scheduler) else []),
        "image = pipe(",
        *(f"    {argument}," for argument in call),
        ").images[0]",
    ]
    return "\n".join(lines)


def save_model_card(
    args: argparse.Namespace,
    family: Family,
    deployment: Deployment,
    *,
    prompt: str,
    hub_model_id: str | None = None,
    training: Mapping[str, object] | None = None,
    images: Sequence[tuple[str, str]] = (),
    comfy: ComfySettings | None = None,
) -> Path:
    """Writes `output_dir/README.md`.

    Args:
        family: the pipeline holds the deployment's scheduler; the card names its class and settings.
        prompt: the example's.
        hub_model_id: where the LoRA will be, and the card with it: of local models it has the names, no paths. Else
            the card loads it from `output_dir`.
        training: settings of the run (reward, beta, learning rate, steps ...), written as a table in this order.
        images: (caption, file name relative to `output_dir`) of validation images.
        comfy: how ComfyUI draws so; None: it has no such model.
    """
    source = model_source(args)
    base_model, lora = source.pretrained_model_name_or_path, hub_model_id or str(args.output_dir)
    on_hub = not Path(base_model).expanduser().exists()
    snippet = usage_snippet(source, family, deployment, lora=lora, prompt=prompt, is_public=hub_model_id is not None)
    if hub_model_id is not None:
        base_model = base_model_name(args)
    data = ModelCardData(
        library_name="diffusers",
        base_model=base_model if on_hub else None,  # the hub takes ids only
        widget=[{"text": caption, "output": {"url": name}} for caption, name in images] or None,
    )
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {Path(lora).resolve().name}",
        f"LoRA weights for {f'[{base_model}](https://huggingface.co/{base_model})' if on_hub else base_model}, tuned "
        "by [Pairwise Sample Optimization](https://arxiv.org/abs/2410.03190) (PSO). They are meant for the scheduler "
        "and the few steps below.",
        *(f"![{caption}]({name})" for caption, name in images),
        f"## Use\n\n```python\n{snippet}\n```",
        *([family.card_note] if family.card_note else []),
    ]
    if comfy is not None:
        name = export_name(args.output_dir)
        sections.append(f"## ComfyUI\n\nPut `{name}` into `models/loras`, and set\n\n{_table(comfy.shown())}")
    if training:
        sections.append(f"## Training\n\n{_table(training)}")
    card = populate_model_card(ModelCard("\n\n".join(sections) + "\n"), tags=[*TAGS, *family.card_tags])
    path = Path(args.output_dir, "README.md")
    card.save(path)
    return path


def _table(values: Mapping[str, object]) -> str:
    rows = "\n".join(f"| {name} | {value} |" for name, value in values.items())
    return f"| setting | value |\n|---|---|\n{rows}"
