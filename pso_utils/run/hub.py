"""The hub: a repository before the hours of training, the result after them, and nothing else."""

import argparse
import re
import shlex
from pathlib import Path

from accelerate import Accelerator
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from huggingface_hub import CommitOperationAdd, create_commit, create_repo, get_token, model_info

from pso_utils.errors import UserError, first_line
from pso_utils.families.lora_export import export_name


def result_files(output_dir) -> list[str]:
    """What may leave the machine, by path: the hub's own filters are patterns whose `*` crosses folders. A link is left
    out, wherever it leads."""
    folder = Path(output_dir)
    names = ["README.md", LORA_WEIGHT_NAME_SAFE, export_name(folder), "before_after.png"]
    pictures = sorted(path.name for path in (folder / "validation").glob("*.png"))
    names += [f"validation/{name}" for name in pictures if re.fullmatch(r"step-\d{6,}\.png", name)]
    return [name for name in names if (folder / name).is_file() and not (folder / name).is_symlink()]


def create_hub_repository(accelerator: Accelerator, args: argparse.Namespace) -> str | None:
    """Creates the repository of --push_to_hub, before the hours of training; None if nothing is to be uploaded.

    Raises:
        UserError: it cannot be created, or it is there, public, and --hub_public is not given.
    """
    if not (args.push_to_hub and accelerator.is_main_process):
        return None
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        repo_id = create_repo(name, exist_ok=True, private=not args.hub_public, token=args.hub_token).repo_id
        is_private = model_info(repo_id, token=args.hub_token).private
    except Exception as error:  # of the hub, the network, the name's form: each library has its own
        raise UserError(
            f"--push_to_hub: the repository {name} cannot be created ({_without_token(error, args)}); log in with "
            "`hf auth login` or set HF_TOKEN, pass another --hub_model_id, or drop --push_to_hub"
        ) from None  # the exception may quote the token
    if not is_private and not args.hub_public:
        raise UserError(
            f"--push_to_hub: {repo_id} is public: pass --hub_public if that is meant, or another repository"
        )
    return repo_id


def push_result(repo_id: str, args: argparse.Namespace):
    """Uploads `result_files`; checkpoints, logs, caches and the references stay local."""
    names = result_files(args.output_dir)
    operations = [CommitOperationAdd(name, Path(args.output_dir, name)) for name in names]
    try:
        create_commit(repo_id, operations, commit_message="End of training", token=args.hub_token)
    except Exception as error:  # as above
        includes = " ".join(f"--include {name}" for name in names)
        raise UserError(
            f"the result is complete in {args.output_dir}, but it could not be uploaded "
            f"({_without_token(error, args)}); do so by `hf upload {repo_id} {shlex.quote(str(args.output_dir))} ."
            f" {includes}`"
        ) from None


def _without_token(error: Exception, args: argparse.Namespace) -> str:
    text = first_line(error)
    for token in (args.hub_token, get_token()):
        if token:
            text = text.replace(token, "***")
    return text
