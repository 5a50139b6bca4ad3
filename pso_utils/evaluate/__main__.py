"""Compares LoRAs with their base: the same prompts and noise under every model, scored by any rewards.

Writes results.json, results.md, scores.parquet (a line for each image), grids, and report.html to look at. Images that
are there already are not drawn again unless a setting has changed.
"""

import argparse

from accelerate.logging import get_logger
from diffusers.training_utils import free_memory

from pso_utils.evaluate.drawing import Images, draw_pending, pending_batches
from pso_utils.evaluate.plan import header, make_plan, parse_args
from pso_utils.evaluate.results import write_results
from pso_utils.evaluate.scoring import measure_data_sharpness, score_all
from pso_utils.run.accelerator import REWARD_DTYPES, make_accelerator, one_line_errors
from pso_utils.run.models import load_family, model_settings


logger = get_logger(__name__)


def run(args: argparse.Namespace):
    plan = make_plan(args)
    accelerator = make_accelerator(args)
    logger.setLevel("INFO")
    images = Images(plan.output_dir / "images", plan.models, model_settings(args), cache_dir=args.cache_dir)
    pending = pending_batches(plan, images, accelerator, batch_size=args.batch_size)
    data_sharpness = None
    if pending or plan.data is not None:
        family = load_family(args, accelerator, plan.info)
        family.denoiser.to(accelerator.device)  # as it is deployed, without autocast
        is_main = accelerator.is_local_main_process
        draw_pending(family, pending, images, cache_dir=args.cache_dir, show_progress=is_main)
        if plan.data is not None:
            data_sharpness = measure_data_sharpness(plan, family, accelerator)
        del family
        free_memory()
    accelerator.wait_for_everyone()
    reward_settings = {"batch_size": args.reward_batch_size, "dtype": REWARD_DTYPES.get(args.reward_dtype)}
    reward_settings["cache_dir"] = args.cache_dir
    scores = score_all(plan, images, accelerator, data_sharpness=data_sharpness, **reward_settings)
    if accelerator.is_main_process:
        print(write_results(plan, images, scores, header=header(args), num_cards=args.num_report_prompts))
        logger.info(f"the report is {plan.output_dir / 'report.html'}")
    accelerator.end_training()


def main(argv=None):
    args = parse_args(argv)
    with one_line_errors(__file__):
        run(args)


if __name__ == "__main__":
    main()
