"""Training prompts: read from a file or from a data set, and dealt out to the epochs."""

from pathlib import Path

from pso_utils.data.folders import read_prompt_files
from pso_utils.data.readers import check_caption, check_columns, open_dataset, parse_json, read_captions
from pso_utils.errors import UserError
from pso_utils.keyed_rng import keyed_permutation


def load_prompts(
    prompts_file: str | None = None,
    *,
    dataset_name: str | None = None,
    caption_column: str = "text",
    max_train_samples: int | None = None,
    **settings,
) -> list[str]:
    """The training prompts of exactly one of a file (`read_prompts_file`) or a data set, of which only the captions are
    read; `settings` are those of `readers.open_dataset`.

    Blank prompts are dropped, repeated ones are kept (they are drawn that much more often), and `max_train_samples`
    keeps the first so many.

    Raises:
        UserError: no source or two of them, an unreadable one, or one without a single prompt.
    """
    if (prompts_file is None) == (dataset_name is None):
        raise UserError("pass either --prompts FILE or --dataset_name NAME, to say where the prompts are")
    if prompts_file is not None:
        name = f"--prompts {prompts_file}"
        captions = read_prompts_file(prompts_file, caption_column)
    else:
        name = f"--dataset_name {dataset_name}"
        dataset = open_dataset(dataset_name, **settings)
        check_columns(dataset.column_names, [caption_column], name, "--caption_column")
        captions = read_captions(dataset, caption_column, range(len(dataset)), name)
    prompts = [caption.strip() for caption in captions if caption.strip()]
    if not prompts:
        raise UserError(f"{name} has no prompts in it: every entry is empty; pass at least one prompt")
    return prompts[:max_train_samples]


def read_prompts_file(path: str, caption_column: str = "text") -> list[str]:
    """Captions of a text file (one a line), of a .json or .jsonl file, or of a folder of text files (one each).

    JSON holds a list, JSONL one entry a line; an entry is a string or an object with a `caption_column` field.
    A JSON object whose `caption_column` field is a list of strings is read as a table of columns.

    Raises:
        UserError: the file is missing, is no text, is no valid JSON, or has an entry without a caption.
    """
    file, name = Path(path).expanduser(), f"--prompts {path}"
    if file.is_dir():
        return read_prompt_files(file, name)
    if not file.is_file():
        raise UserError(
            f"{name} is not a file; pass a text file (one prompt a line), .json, .jsonl or a folder of .txt files"
        )
    try:
        text = file.read_text(encoding="utf-8-sig")  # Windows editors put a byte order mark first
    except UnicodeDecodeError:
        raise UserError(f"{name} is not UTF-8 text; pass a text file, .json or .jsonl") from None
    if file.suffix == ".json":
        entries = parse_json(text, name)
        if isinstance(entries, dict):
            entries = entries.get(caption_column)
        if not isinstance(entries, list):
            raise UserError(
                f"{name} must hold a list of strings, a list of objects or an object with a list of strings under"
                f" '{caption_column}' (--caption_column)"
            )
    elif file.suffix == ".jsonl":  # split at "\n" alone: splitlines would split a string at U+2028
        lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        entries = [parse_json(line, f"{name}, line {number}") for number, line in lines]
    else:
        return text.split("\n")
    return [caption_of(entry, caption_column, f"{name}, entry {number}") for number, entry in enumerate(entries, 1)]


def caption_of(entry, caption_column: str, where: str) -> str:
    if not isinstance(entry, dict):
        return check_caption(entry, where)
    if caption_column not in entry:
        raise UserError(f"{where} has no field '{caption_column}'; pass --caption_column, one of {sorted(entry)}")
    return check_caption(entry[caption_column], where)


def epoch_prompts(prompts: list[str], *, seed: int, epoch: int, count: int) -> list[str]:
    """The `count` prompts of an epoch, in order: drawn without replacement, pass after pass over all the prompts.

    Every pass is its own permutation keyed by (seed, pass), so the prompt at an index depends on neither the batch size
    nor the number of processes.
    """
    first, last = epoch * count, (epoch + 1) * count
    passes = range(first // len(prompts), -(-last // len(prompts)))
    order = [index for number in passes for index in keyed_permutation((seed, number), len(prompts)).tolist()]
    start = first % len(prompts)
    return [prompts[index] for index in order[start : start + count]]
