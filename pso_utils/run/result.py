"""The end of a run: its LoRA, pictures and model card, in `output_dir` and on the hub."""

import argparse

from accelerate import Accelerator
from accelerate.logging import get_logger

from pso_utils.errors import UserError
from pso_utils.families import Deployment, Family
from pso_utils.families.loading import ModelInfo
from pso_utils.run import hub
from pso_utils.run.accelerator import on_main_process
from pso_utils.run.checkpoints import TrainingState, latest_line
from pso_utils.run.comfyui import comfy_settings
from pso_utils.run.export import export_run
from pso_utils.run.interruption import signals
from pso_utils.run.model_card import save_model_card
from pso_utils.run.resumption import mark_finished
from pso_utils.run.validation import Validation


logger = get_logger(__name__)


def save_lora(
    args: argparse.Namespace, accelerator: Accelerator, family: Family, *, info: ModelInfo, deployment: Deployment
):
    """Writes the LoRA, for diffusers and for other tools; all processes call it. To be called before anything is drawn
    with it, so that a failure there loses nothing. From here on a signal ends the program at once."""

    def write():
        family.save_lora(args.output_dir)
        try:
            path = export_run(args, info, deployment)
        except UserError as error:  # what it is made of is saved
            logger.warning(f"there is no LoRA for other tools: {error}; python -m pso_utils.convert makes it up")
            return
        if path is None:
            name = family.pipeline_class.__name__
            logger.info(f"no tool but diffusers is known to read a LoRA of a {name}: there is none for others")
        else:
            logger.info(f"the LoRA for ComfyUI and other tools is {path}")

    try:
        on_main_process(accelerator, write)
    except UserError as error:
        raise UserError(f"{error}; {latest_line(args.output_dir)}") from error
    signals.end_at_once()


def save_card_and_pictures(
    args: argparse.Namespace,
    accelerator: Accelerator,
    validate: Validation,
    state: TrainingState,
    *,
    info: ModelInfo,
    settings: dict,
    repo_id: str | None,
):
    """Draws before and after, writes the model card with the run's `settings`, and uploads to `repo_id`, if there is
    one; all processes call it."""
    images = validate.save_before_and_after(state)
    if accelerator.is_main_process:
        comfy = None
        if info.family.tool_format(info.denoiser_config) is not None:
            comfy = comfy_settings(info, validate.deployment, guidance_scale=args.guidance_scale)
        save_model_card(
            args,
            validate.family,
            validate.deployment,
            prompt=validate.prompts[0],
            hub_model_id=repo_id,
            training=settings,
            comfy=comfy,
            images=images,
        )
        mark_finished(args, state.global_step)
        if repo_id is not None:
            hub.push_result(repo_id, args)
        logger.info(f"the LoRA and its model card are in {args.output_dir}")
    accelerator.end_training()
