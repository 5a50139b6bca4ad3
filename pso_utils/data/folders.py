"""Folders of images as people keep them: captions in text files beside the images, a folder of winners beside one of
losers, a list of pairs. Each is read as records of paths; no image is opened."""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pso_utils.data.images import regular_file
from pso_utils.data.readers import check_caption, check_folder, image_files, images_of_folder, parse_json
from pso_utils.errors import UserError, first_line


logger = logging.getLogger(__name__)

CAPTION_SUFFIX = ".txt"
PAIR_FOLDERS = (("winner", "loser"), ("w", "l"), ("chosen", "rejected"))
PAIR_LIST = "pairs.jsonl"


class Example(NamedTuple):
    """A target with its caption, of a pair with its reference: paths of images."""

    target: str
    caption: str
    reference: str | None = None


def read_text(path: Path, folder: Path) -> str:
    """The text of a file that stays in the `folder`, links followed: captions are shown, and may be uploaded.

    Raises:
        FileNotFoundError: there is none.
        UserError: it leads elsewhere, is no regular file, cannot be read, or is not UTF-8.
    """
    try:
        return regular_file(path, [folder]).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}): mend that, then go on") from error


def read_caption(image: Path, folder: Path) -> str | None:
    """The text file's beside the image, in one line; None where there is none, or an empty one. Errors as of
    `read_text`."""
    try:
        return " ".join(read_text(image.with_suffix(CAPTION_SUFFIX), folder).split()) or None
    except FileNotFoundError:
        return None


def captioned_images(folder: Path, name: str, *, caption: str | None, is_flat: bool = False) -> list[Example]:
    """The images of a folder and its subfolders (not with `is_flat`), sorted, with the captions beside them; the others
    have `caption`, or without one are left out, which is a warning, as are captions without an image.

    Raises:
        UserError: there is no image, or none with a caption.
    """
    images = [Path(file) for file in images_of_folder(folder, name, is_flat=is_flat)]
    named = {image.with_suffix("") for image in images}
    texts = sorted(folder.glob(f"*{CAPTION_SUFFIX}") if is_flat else folder.rglob(f"*{CAPTION_SUFFIX}"))
    texts = [text for text in texts if text.with_suffix("") not in named]
    _warn_left_out(texts, folder, name, "captions without an image of their name", "rename or remove them")
    captions = _captions(images, folder, name, default=caption)
    return [Example(str(image), text) for image, text in captions.items()]


def _captions(images: Sequence[Path], folder: Path, name: str, *, default: str | None) -> dict[Path, str]:
    """The images that have a caption, with it; a `UserError` where none has."""
    captions = {image: read_caption(image, folder) or default for image in images}
    without = [image for image, text in captions.items() if text is None]
    num_own = sum(text != default for text in captions.values())
    if default is not None and num_own:
        logger.warning(f"{name}: {num_own} of {len(images)} images have a caption of their own, not --instance_prompt")
    if without:
        remedy = f"write {without[0].stem}{CAPTION_SUFFIX} beside it, or pass --instance_prompt for all of them"
        if len(without) == len(images):
            raise UserError(f"{name} has {len(images)} images and no captions, as of {without[0].name}: {remedy}")
        _warn_left_out(without, folder, name, "images without a caption", remedy)
    return {image: text for image, text in captions.items() if text is not None}


def pair_folders(folder: Path, name: str) -> tuple[Path, Path] | None:
    """The folders of the winners and of the losers; None where there is neither.

    Raises:
        UserError: one of them is alone.
    """
    for winner, loser in PAIR_FOLDERS:
        found = [(folder / each).is_dir() for each in (winner, loser)]
        if all(found):
            return folder / winner, folder / loser
        if any(found):
            there, missing = (winner, loser) if found[0] else (loser, winner)
            raise UserError(f"{name} has a folder {there} and no {missing}: put the other image of each pair there")
    return None


def paired_images(folder: Path, name: str, *, caption: str | None) -> list[Example]:
    """The pairs of a folder: those that its pairs.jsonl lists, or the images of equal names in its folders of winners
    and losers, with the captions beside the winners, or else `caption`. What has no partner or caption is left out,
    which is a warning.

    Raises:
        UserError: the folder has neither, or not one pair.
    """
    check_folder(folder, name)
    if (folder / PAIR_LIST).is_file():
        return _listed_pairs(folder / PAIR_LIST)
    folders = pair_folders(folder, name)
    if folders is None:
        known = ", ".join("/ and ".join(names) + "/" for names in PAIR_FOLDERS)
        raise UserError(f"{name} has no pairs: pass a folder with {known}, or with a {PAIR_LIST}")
    winners, losers = ({_name_in(own, path): path for path in _images(own)} for own in folders)
    common = sorted(winners.keys() & losers.keys())
    if not common:
        raise UserError(
            f"{name} has {len(winners)} winners and {len(losers)} losers, and no two of one name: name the images of a"
            " pair alike"
        )
    alone = sorted(
        [*(winners[key] for key in winners.keys() - losers), *(losers[key] for key in losers.keys() - winners)]
    )
    _warn_left_out(alone, folder, name, "images without a partner of their name", "rename or remove them")
    captions = _captions([winners[key] for key in common], folder, name, default=caption)
    return [
        Example(str(winners[key]), captions[winners[key]], str(losers[key]))
        for key in common
        if winners[key] in captions
    ]


def _images(folder: Path) -> list[Path]:
    images = [Path(file) for file in image_files(folder.rglob("*"))]
    name, count = Counter(_name_in(folder, image) for image in images).most_common(1)[0] if images else ("", 0)
    if count > 1:
        raise UserError(f"{folder} has {count} images called {name}: keep one of them")
    return images


def _name_in(folder: Path, image: Path) -> str:
    return image.relative_to(folder).with_suffix("").as_posix()


def _listed_pairs(path: Path) -> list[Example]:
    """Of a JSONL file with `winner`, `loser` and `caption`; the paths start in its folder, and stay there."""
    examples = []
    # splitlines would split a string at U+2028
    for number, line in enumerate(read_text(path, path.parent).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        entry = parse_json(line, where)
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("winner", "loser")):
            raise UserError(f'{where} needs {{"winner": "a.png", "loser": "b.png", "caption": "..."}}')
        files = []
        for key in ("winner", "loser"):
            try:
                files.append(str(regular_file(entry[key], [path.parent])))
            except FileNotFoundError:
                raise UserError(f"{where}: {key} {entry[key]} does not exist; correct its path") from None
            except (OSError, ValueError) as error:
                raise UserError(f"{where}: {key} {entry[key]!r} cannot be read ({error})") from None
        examples.append(Example(files[0], check_caption(entry.get("caption"), where), files[1]))
    if not examples:
        raise UserError(f"{path} has no pairs in it; pass one with a line for each pair")
    return examples


def read_prompt_files(folder: Path, name: str) -> list[str]:
    """The texts of a folder's .txt files, sorted by name, each a prompt in one line."""
    files = sorted(path for path in folder.rglob(f"*{CAPTION_SUFFIX}") if path.is_file())
    if not files:
        raise UserError(f"{name} has no {CAPTION_SUFFIX} files in it; pass a folder of captions, or a file of prompts")
    return [caption for path in files if (caption := read_caption(path, folder)) is not None]


def _warn_left_out(paths: Sequence[Path], folder: Path, name: str, what: str, remedy: str):
    if paths:
        shown = ", ".join(str(path.relative_to(folder)) for path in paths[:3]) + (", ..." if len(paths) > 3 else "")
        logger.warning(f"{name} has {len(paths)} {what} ({shown}), which are left out: {remedy}")
