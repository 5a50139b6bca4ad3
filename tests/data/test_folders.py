"""The layouts of folders that people keep their images in, and what is told where one is nearly right."""

import json
import os
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from pso_utils.data.folders import captioned_images, paired_images, read_prompt_files
from pso_utils.data.pairs import check_images, load_image_folder, load_pair_folder
from pso_utils.errors import UserError


def write(folder: Path, files: dict) -> Path:
    """Images by name, of a size, and texts; bytes as they are."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, tuple):
            Image.new("RGB", content, "red").save(path)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content, encoding="utf-8")
    return folder


@contextmanager
def rejects(*texts: str):
    with pytest.raises(UserError) as error:
        yield
    assert "\n" not in str(error.value)
    for text in texts:
        assert text in str(error.value)


SIZE = (8, 6)
STYLE = {"b.jpg": SIZE, "b.txt": "a fox,\nin snow\n", "sub/a.png": SIZE, "sub/a.txt": "\ufeffan owl ", "c.png": SIZE}


def named(examples) -> list[tuple]:
    return [
        tuple(Path(value).name if "/" in value else value for value in example if value is not None)
        for example in examples
    ]


def test_captions_stand_beside_their_images(tmp_path, caplog):
    folder = write(tmp_path, STYLE | {"notes.txt": "mine", "d.png": SIZE, "d.txt": " \n"})
    assert named(captioned_images(folder, "--flag f", caption=None)) == [
        ("b.jpg", "a fox, in snow"),
        ("a.png", "an owl"),
    ]
    assert "--flag f has 2 images without a caption (c.png, d.png), which are left out: write c.txt" in caplog.text
    assert "1 captions without an image of their name (notes.txt)" in caplog.text
    everything = captioned_images(folder, "--flag f", caption="ink")
    assert [caption for _, caption in named(everything)] == ["a fox, in snow", "ink", "ink", "an owl"]
    flat = captioned_images(folder, "--flag f", caption="ink", is_flat=True)
    assert [name for name, _ in named(flat)] == ["b.jpg", "c.png", "d.png"]


@pytest.mark.parametrize("winner, loser", [("winner", "loser"), ("w", "l"), ("chosen", "rejected")])
def test_winners_and_losers_of_one_name_are_pairs(tmp_path, caplog, winner, loser):
    files = {f"{winner}/1.png": SIZE, f"{winner}/1.txt": "a fox", f"{loser}/1.jpg": SIZE, f"{loser}/1.txt": "ignored"}
    files |= {f"{winner}/deep/2.png": SIZE, f"{winner}/deep/2.txt": "an owl", f"{loser}/deep/2.png": SIZE}
    files |= {f"{winner}/3.png": SIZE, f"{loser}/4.png": SIZE, f"{winner}/5.png": SIZE, f"{loser}/5.png": SIZE}
    folder = write(tmp_path, files)
    pairs = paired_images(folder, "--flag f", caption=None)
    assert named(pairs) == [("1.png", "a fox", "1.jpg"), ("2.png", "an owl", "2.png")]
    assert all(f"/{winner}/" in pair.target and f"/{loser}/" in pair.reference for pair in pairs)
    alone = ", ".join(sorted([f"{loser}/4.png", f"{winner}/3.png"]))
    assert f"2 images without a partner of their name ({alone})" in caplog.text
    assert f"1 images without a caption ({winner}/5.png)" in caplog.text and "write 5.txt beside it" in caplog.text
    assert [pair.caption for pair in paired_images(folder, "f", caption="ink")] == ["a fox", "ink", "an owl"]


def test_pairs_are_listed_in_a_file(tmp_path):
    lines = [
        {"winner": "a.png", "loser": "sub/b.png", "caption": "a\u2028fox"},
        {"winner": "sub/b.png", "loser": "a.png", "caption": ""},
    ]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n"
    folder = write(tmp_path, {"a.png": SIZE, "sub/b.png": SIZE, "pairs.jsonl": text})
    assert named(paired_images(folder, "f", caption=None)) == [("a.png", "a\u2028fox", "b.png"), ("b.png", "", "a.png")]


def test_prompts_are_the_texts_of_a_folder(tmp_path):
    folder = write(tmp_path, {"b.txt": "an owl\n", "a/c.txt": "a fox,\nred", "e.txt": " ", "d.md": "no prompt"})
    assert read_prompt_files(folder, "--prompts f") == ["a fox, red", "an owl"]
    with rejects("--prompts g has no .txt files in it"):
        read_prompt_files(write(tmp_path / "g", {"d.md": "no prompt"}), "--prompts g")


NEAR_MISSES = {
    "a .txt alone": ({"fox.txt": "a fox"}, "no images in it"),
    "no caption": ({"a.png": SIZE, "b.png": SIZE}, "2 images and no captions, as of a.png: write a.txt beside it"),
    "names that do not match": (
        {"a.png": SIZE, "b.txt": "a fox"},
        "1 images and no captions, as of a.png: write a.txt",
    ),
    "Latin-1": ({"a.png": SIZE, "a.txt": "Vögel".encode("latin-1")}, "a.txt is not UTF-8 text: save it as UTF-8"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_folder_that_is_nearly_right_is_one_line_with_file_and_remedy(tmp_path, name):
    files, message = NEAR_MISSES[name]
    with rejects(message):
        captioned_images(write(tmp_path, files), "--train_data_dir f", caption=None)


LINE = '{"winner": "a.png", "loser": "b.png", "caption": "a fox"}'
PAIR_MISSES = {
    "winners alone": ({"winner/a.png": SIZE}, "has a folder winner and no loser"),
    "losers alone": ({"l/a.png": SIZE}, "has a folder l and no w"),
    "neither": ({"a.png": SIZE}, "has no pairs: pass a folder with winner/ and loser/"),
    "names that do not match": ({"w/a.png": SIZE, "l/b.png": SIZE}, "1 winners and 1 losers, and no two of one name"),
    "two of one name": ({"w/a.png": SIZE, "w/a.jpg": SIZE, "l/a.png": SIZE}, "has 2 images called a"),
    "no caption": ({"w/a.png": SIZE, "l/a.png": SIZE}, "1 images and no captions, as of a.png: write a.txt beside it"),
    "Latin-1": ({"w/a.png": SIZE, "l/a.png": SIZE, "w/a.txt": b"V\xf6gel"}, "a.txt is not UTF-8 text"),
    "an empty list": ({"pairs.jsonl": "\n"}, "pairs.jsonl has no pairs in it"),
    "a list in Latin-1": ({"pairs.jsonl": b"V\xf6gel"}, "pairs.jsonl is not UTF-8 text"),
    "no JSON": ({"pairs.jsonl": LINE + "\n{"}, "line 1: winner a.png does not exist"),
    "no JSON at all": ({"pairs.jsonl": "{"}, "pairs.jsonl, line 1 is not valid JSON"),
    "a missing key": ({"pairs.jsonl": '{"winner": "a.png"}'}, 'line 1 needs {"winner"'),
    "no caption in the list": ({"pairs.jsonl": LINE.replace(', "caption": "a fox"', ""), "a.png": SIZE, "b.png": SIZE},
                               "line 1 has a caption that is no string"),
    "a missing file": ({"pairs.jsonl": LINE, "a.png": SIZE}, "line 1: loser b.png does not exist"),
    "a way out": ({"pairs.jsonl": LINE.replace("a.png", "../a.png")}, "leads out of"),
    "a zero byte": ({"pairs.jsonl": LINE.replace("a.png", "a" + chr(92) + "u0000.png")}, "line 1: winner"),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIR_MISSES)
def test_pairs_that_are_nearly_right_are_one_line_with_file_and_remedy(tmp_path, name):
    files, message = PAIR_MISSES[name]
    with rejects(message):
        paired_images(write(tmp_path, files), "--train_data_dir f", caption=None)


def test_every_image_is_opened_and_a_broken_one_named(tmp_path, caplog):
    files = {"w/1.png": (8, 6), "w/1.txt": "a fox", "l/1.png": (4, 4), "w/2.png": (6, 9), "w/2.txt": "an owl"}
    folder = write(tmp_path, files | {"l/2.png": b"no picture"})
    source = load_pair_folder(str(folder), flag="--train_data_dir")
    with rejects("l/2.png: not an image that Pillow reads", "mend or remove it, or pass --skip_broken_images"):
        check_images(source, skip_broken_images=False)
    assert check_images(source, skip_broken_images=True) == [(8, 6)]
    assert "has 1 broken images, which are left out" in caplog.text


@pytest.mark.parametrize("content", ["a link", "a FIFO", "a folder"])
def test_a_caption_stays_in_its_folder_and_is_a_regular_file(tmp_path, content):
    """It is shown in pictures and in the card, which --push_to_hub uploads."""
    folder = write(tmp_path / "images", {"a.png": SIZE, "b.png": SIZE, "b.txt": "an owl"})
    (tmp_path / "id_rsa").write_text("secret")
    if content == "a link":
        (folder / "a.txt").symlink_to(tmp_path / "id_rsa")
    elif content == "a FIFO":
        os.mkfifo(folder / "a.txt")
    else:
        (folder / "a.txt").mkdir()
    with rejects("a.txt"):
        captioned_images(folder, "--train_data_dir f", caption=None)
    if content == "a link":
        with rejects("a.txt leads out of"):
            read_prompt_files(folder, "--prompts f")


def test_a_huge_image_is_refused_by_its_header(tmp_path):
    Image.new("1", (12_000, 12_000)).save(tmp_path / "b.png")
    source = load_image_folder(str(tmp_path), flag="--instance_data_dir", caption="a fox", is_flat=True)
    with rejects("b.png: 12000 x 12000 pixels are more than"):
        check_images(source, skip_broken_images=False)


def test_another_size_or_time_of_a_file_is_another_fingerprint(tmp_path):
    folder = write(tmp_path, {"w/1.png": SIZE, "w/1.txt": "a fox", "l/1.png": SIZE})
    fingerprints = [load_pair_folder(str(folder), flag="f").fingerprint for _ in range(2)]
    write(folder, {"l/1.png": (9, 9)})
    fingerprints.append(load_pair_folder(str(folder), flag="f").fingerprint)
    write(folder, {"w/1.txt": "an owl"})
    fingerprints.append(load_pair_folder(str(folder), flag="f").fingerprint)
    assert fingerprints[0] == fingerprints[1] and len(set(fingerprints)) == 3


def test_captions_that_stand_in_for_the_instance_prompt_are_counted(tmp_path, caplog):
    folder = write(tmp_path, {"a.png": SIZE, "b.png": SIZE, "b.txt": "sks dog, asleep"})
    captioned_images(folder, "--instance_data_dir f", caption="sks dog", is_flat=True)
    assert "--instance_data_dir f: 1 of 2 images have a caption of their own, not --instance_prompt" in caplog.text
    caplog.clear()
    (folder / "b.txt").unlink()
    captioned_images(folder, "--instance_data_dir f", caption="sks dog", is_flat=True)
    assert not caplog.records
