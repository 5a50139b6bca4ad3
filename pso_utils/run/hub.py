"""The hub: a repository before the hours of training, the result after them."""

import argparse
from pathlib import Path

from accelerate import Accelerator
from huggingface_hub import create_repo, upload_folder

from pso_utils.errors import UserError, first_line


def create_hub_repository(accelerator: Accelerator, args: argparse.Namespace) -> str | None:
    """Creates the repository of --push_to_hub, before the hours of training; None if nothing is to be uploaded."""
    if not (args.push_to_hub and accelerator.is_main_process):
        return None
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        return create_repo(name, exist_ok=True, token=args.hub_token).repo_id
    except Exception as error:  # of the hub, the network, the name's form: each library has its own
        raise UserError(
            f"--push_to_hub: the repository {name} cannot be created ({first_line(error)}); log in with `hf auth login`"
            " or pass --hub_token, pass another --hub_model_id, or drop --push_to_hub"
        ) from error


# All that leaves the machine: no checkpoints, logs or metrics, and nothing that was made of the training images.
UPLOADED = [
    "README.md",
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights_kohya.safetensors",
    "before_after.png",
    "validation/step-*.png",
]


def push_folder(repo_id: str, args: argparse.Namespace):
    """Uploads the run's result, the files of `UPLOADED`."""
    try:
        upload_folder(
            repo_id=repo_id,
            folder_path=args.output_dir,
            commit_message="End of training",
            allow_patterns=UPLOADED,
            token=args.hub_token,
        )
    except Exception as error:  # as above
        include = " ".join(f"--include '{pattern}'" for pattern in UPLOADED)
        raise UserError(
            f"the result is complete in {args.output_dir}, but it could not be uploaded ({first_line(error)}); do so by"
            f" `hf upload {repo_id} {args.output_dir} {include}`"
        ) from error
