"""Training prompts: read from a file or from a dataset, and dealt out to the epochs."""

import json
from pathlib import Path

from pso_utils.mdp import keyed_noise


def load_prompts(
    prompts_file: str | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    dataset_split: str = "train",
    caption_column: str = "text",
    max_train_samples: int | None = None,
    cache_dir: str | None = None,
    num_workers: int = 0,
) -> list[str]:
    """Reads the training prompts from exactly one of a local file (`read_prompts_file`) or a dataset.

    Blank prompts are dropped, repeated ones are kept (they are drawn that much more often), and `max_train_samples`
    keeps the first so many.

    Raises:
        ValueError: no source or two of them, an unreadable one, or one without a single prompt.
    """
    if (prompts_file is None) == (dataset_name is None):
        raise ValueError("pass either --prompts FILE or --dataset_name NAME, to say where the prompts are")
    if prompts_file is not None:
        source = f"--prompts {prompts_file}"
        captions = read_prompts_file(prompts_file, caption_column)
    else:
        source = f"--dataset_name {dataset_name}"
        captions = read_dataset_captions(
            dataset_name, dataset_config_name, dataset_split, caption_column, cache_dir, num_workers
        )
    prompts = [caption.strip() for caption in captions if caption.strip()]
    if not prompts:
        raise ValueError(f"{source} has no prompts in it: every entry is empty; pass at least one prompt")
    return prompts[:max_train_samples]


def read_prompts_file(path: str, caption_column: str = "text") -> list[str]:
    """Captions of a text file (one a line), or of a .json or .jsonl file.

    JSON holds a list, JSONL one entry a line; an entry is a string or an object with a `caption_column` field.
    A JSON object whose `caption_column` field is a list of strings is read as a table of columns.

    Raises:
        ValueError: the file is missing, is no text, is no valid JSON, or has an entry without a caption.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"--prompts {path} is not a file; pass a text file (one prompt a line), .json or .jsonl")
    try:
        text = file.read_text(encoding="utf-8-sig")  # Windows editors put a byte order mark first
    except UnicodeDecodeError:
        raise ValueError(f"--prompts {path} is not UTF-8 text; pass a text file, .json or .jsonl") from None
    if file.suffix == ".json":
        entries = parse_json(text, path)
        if isinstance(entries, dict):
            entries = entries.get(caption_column)
        if not isinstance(entries, list):
            raise ValueError(
                f"--prompts {path} must hold a list of strings, a list of objects or an object with a list of strings"
                f" under '{caption_column}' (--caption_column)"
            )
    elif file.suffix == ".jsonl":  # split at "\n" alone: splitlines would split a string at U+2028
        lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        entries = [parse_json(line, f"{path}, line {number}") for number, line in lines]
    else:
        return text.split("\n")
    return [caption_of(entry, caption_column, f"--prompts {path}, entry {i}") for i, entry in enumerate(entries, 1)]


def parse_json(text: str, where: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--prompts {where} is not valid JSON: {error}") from None


def caption_of(entry, caption_column: str, where: str) -> str:
    caption = entry.get(caption_column) if isinstance(entry, dict) else entry
    if isinstance(caption, str):
        return caption
    if isinstance(entry, dict) and caption_column not in entry:
        raise ValueError(f"{where} has no field '{caption_column}'; pass --caption_column, one of {sorted(entry)}")
    raise ValueError(f"{where} has a caption that is no string: {caption!r}")


def read_dataset_captions(
    dataset_name: str,
    dataset_config_name: str | None,
    dataset_split: str,
    caption_column: str,
    cache_dir: str | None,
    num_workers: int,
) -> list[str]:
    """Captions of a dataset of the hub or of a local folder; no other column is decoded.

    Raises:
        ValueError: the dataset cannot be loaded, or has no such split or column.
    """
    from datasets import load_dataset  # imported here because it takes seconds and a prompts file does without

    try:
        dataset = load_dataset(
            dataset_name,
            dataset_config_name,
            split=dataset_split,
            cache_dir=cache_dir,
            num_proc=num_workers or None,
        )
    except Exception as error:  # datasets raises a dozen unrelated classes for a source that it cannot read
        raise ValueError(
            f"cannot load --dataset_name {dataset_name} (--dataset_config_name {dataset_config_name},"
            f" --dataset_split {dataset_split}): {error}"
        ) from error
    if caption_column not in dataset.column_names:
        raise ValueError(
            f"--dataset_name {dataset_name} has no column '{caption_column}'; pass --caption_column, one of"
            f" {sorted(dataset.column_names)}"
        )
    captions = list(dataset.select_columns(caption_column)[caption_column])
    return [caption_of(caption, caption_column, f"--dataset_name {dataset_name}") for caption in captions]


def epoch_prompts(prompts: list[str], seed: int, epoch: int, count: int) -> list[str]:
    """The `count` prompts of an epoch, by slot: drawn without replacement, pass after pass over all the prompts.

    Every pass is its own permutation keyed by (seed, pass), so a slot's prompt depends on neither the batch size nor
    the number of processes.
    """
    first, last = epoch * count, (epoch + 1) * count
    passes = range(first // len(prompts), -(-last // len(prompts)))
    orders = keyed_noise([(seed, number) for number in passes], (len(prompts),)).argsort(dim=1)
    start = first - passes[0] * len(prompts)
    return [prompts[index] for index in orders.flatten()[start : start + count].tolist()]
