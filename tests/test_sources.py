"""Sources of weights: how a flag's value is split, found and read, and one clear line where it cannot be."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pso_utils.errors import UserError
from pso_utils.sources import check_exists, fetch_file, read_weights, source_state, split_source, weight_shapes


WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones((), dtype=torch.float16)}


@pytest.fixture(params=["unet.safetensors", "unet.bin"])
def weights_file(request, tmp_path) -> Path:
    path = tmp_path / request.param
    save_file(WEIGHTS, path) if path.suffix == ".safetensors" else torch.save(WEIGHTS, path)
    return path


def raises_one_line(match):
    """A UserError of one line."""
    return pytest.raises(UserError, match=rf"(?s)\A(?!.*\n).*{match}")


# ---- split_source ----


def test_a_local_file_is_its_folder_and_its_name(weights_file):
    assert split_source(str(weights_file)) == (str(weights_file.parent), weights_file.name)


def test_a_local_file_with_a_colon_in_its_name_is_no_repo(tmp_path):
    (tmp_path / "a:b.bin").touch()
    assert split_source(f"{tmp_path}/a:b.bin") == (str(tmp_path), "a:b.bin")


def test_a_folder_has_no_file(tmp_path):
    (tmp_path / "with:colon").mkdir()
    for folder in (tmp_path, tmp_path / "with:colon"):
        assert split_source(str(folder)) == (str(folder), None)


def test_a_tilde_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "unet.bin").touch()
    assert split_source("~/models") == (str(folder), None)
    for source in ("~/models/unet.bin", "~/models:unet.bin"):
        assert split_source(source) == (str(folder), "unet.bin")
    check_exists("~/models/unet.bin", "--flag")


@pytest.mark.parametrize(
    "source, expected",
    [
        ("user/name", ("user/name", None)),
        ("user/name:unet.bin", ("user/name", "unet.bin")),
        ("user/name:unet/model.safetensors", ("user/name", "unet/model.safetensors")),
        ("no/such/folder", ("no/such/folder", None)),
    ],
)
def test_what_is_not_here_is_a_hub_id_and_what_stands_behind_the_colon(source, expected):
    assert split_source(source) == expected


# ---- check_exists ----


def test_what_exists_or_may_be_on_the_hub_passes(weights_file):
    for source in (str(weights_file), str(weights_file.parent), "user/name", "name", "user/name-1.0_b"):
        check_exists(source, "--flag")


@pytest.mark.parametrize("source", ["/no/such", "./missing", "a/b/c", "missing.safetensors", "user/unet.bin", ""])
def test_what_cannot_be_on_the_hub_must_exist(source):
    with raises_one_line("--flag: .*does not exist; pass a local path or a hub id"):
        check_exists(source or "/no/such", "--flag")


# ---- fetch_file ----


def test_a_file_of_a_folder_is_its_path(weights_file):
    assert fetch_file(str(weights_file.parent), weights_file.name) == str(weights_file)


def test_a_file_that_a_folder_lacks_is_an_error(tmp_path):
    with raises_one_line("missing.bin does not exist"):
        fetch_file(str(tmp_path), "missing.bin")


@pytest.mark.parametrize("location", ["nobody/no-such", "not a hub id"])
def test_a_file_that_the_hub_lacks_is_an_error_that_names_it(location, tmp_path):
    with raises_one_line(f"{location}:unet.bin is neither here nor on the hub: [A-Za-z]+"):
        fetch_file(location, "unet.bin", cache_dir=str(tmp_path))


# ---- Reading ----


def test_weights_are_read_with_their_dtypes(weights_file):
    weights = read_weights(str(weights_file))
    assert weights.keys() == WEIGHTS.keys()
    for name, value in WEIGHTS.items():
        assert weights[name].dtype == value.dtype and torch.equal(weights[name], value)


def test_shapes_are_those_of_the_weights(tmp_path):
    save_file(WEIGHTS, tmp_path / "unet.safetensors")
    assert weight_shapes(str(tmp_path / "unet.safetensors")) == {"a": (2, 3), "b": ()}


@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff" * 64])
@pytest.mark.parametrize("read", [read_weights, weight_shapes])
def test_what_is_not_safetensors_is_an_error(tmp_path, read, content):
    (tmp_path / "unet.safetensors").write_bytes(content)
    with raises_one_line("not a readable .safetensors file"):
        read(str(tmp_path / "unet.safetensors"))


def test_a_truncated_safetensors_is_an_error(tmp_path):
    path = tmp_path / "unet.safetensors"
    save_file(WEIGHTS, path)
    path.write_bytes(path.read_bytes()[:-4])
    with raises_one_line("not a readable .safetensors file"):
        read_weights(str(path))


def test_a_pickle_that_is_not_weights_is_refused_and_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"x": Payload()}, tmp_path / "unet.bin")
    with raises_one_line("cannot be read as weights"):
        read_weights(str(tmp_path / "unet.bin"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content", [b"", b"not a pickle", b"\x80\x02garbage", b"\x80\x02.", b"\x80\x02h\x00.", b"PK\x03\x04broken"]
)
def test_a_bin_that_is_no_pickle_is_an_error(tmp_path, content):
    (tmp_path / "unet.bin").write_bytes(content)
    with raises_one_line("cannot be read as weights"):
        read_weights(str(tmp_path / "unet.bin"))


@pytest.mark.parametrize("as_zip", (True, False))
def test_a_truncated_bin_is_an_error(tmp_path, as_zip):
    path = tmp_path / "unet.bin"
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=as_zip)
    content = path.read_bytes()
    for length in range(0, len(content) - 1, 31):
        path.write_bytes(content[:length])
        with raises_one_line("cannot be read as weights"):
            read_weights(str(path))


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {"state_dict": {"a": torch.ones(1)}}, torch.ones(2)])
def test_a_bin_without_a_state_dict_is_an_error(tmp_path, content):
    torch.save(content, tmp_path / "unet.bin")
    with raises_one_line("no state dict of tensors"):
        read_weights(str(tmp_path / "unet.bin"))


# ---- source_state ----


def test_the_state_of_local_files_changes_when_one_is_saved_anew(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "a.safetensors").write_bytes(b"1")
    (tmp_path / "README.md").write_text("no part of the model")
    state = source_state(str(tmp_path))
    assert [entry[:2] for entry in state] == [["unet/a.safetensors", 1]] and json.loads(json.dumps(state)) == state
    file = tmp_path / "unet" / "a.safetensors"
    alone = source_state(str(file))
    assert source_state(f"{tmp_path / 'unet'}:a.safetensors") == alone and alone[0][:2] == ["a.safetensors", 1]
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))  # other weights of the same size
    assert source_state(str(tmp_path)) != state and source_state(str(file)) != alone
    (tmp_path / "unet" / "a.safetensors").rename(tmp_path / "a.safetensors")
    assert [entry[0] for entry in source_state(str(tmp_path))] == ["a.safetensors"]
    assert source_state(None) is None


@pytest.mark.parametrize("name", ["model_index.json", "tokenizer/chat_template.jinja", "tokenizer/merges.txt"])
def test_the_state_of_a_folder_has_its_configurations_tokenizers_and_their_template(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    assert [entry[0] for entry in source_state(str(tmp_path))] == [name]


def test_the_state_of_a_hubs_model_is_its_commit(tmp_path):
    def download(commit, name, reference="main"):
        repo = tmp_path / "models--me--mine"
        (repo / "snapshots" / commit / name).parent.mkdir(parents=True, exist_ok=True)
        (repo / "snapshots" / commit / name).touch()
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / reference).write_text(commit)

    def state(source="me/mine", **settings):
        return source_state(source, cache_dir=str(tmp_path), **settings)

    first, second, other = (40 * digit for digit in "123")
    assert state() == ["me/mine", None]
    download(first, "model_index.json")
    assert state() == ["me/mine", first]
    download(second, "model_index.json")
    download(second, "lora/own.safetensors")
    assert state() == ["me/mine", second]
    assert state("me/mine:lora/own.safetensors") == ["me/mine:lora/own.safetensors", second]
    download(other, "config.json", "v2")
    assert state(revision="v2") == ["me/mine", other]
    with raises_one_line("neither here nor on the hub"):
        state("me/mine:other.safetensors")
