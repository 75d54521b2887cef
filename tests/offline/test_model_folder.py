from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from tunerkit.errors import CheckpointError, CheckpointNotFoundError
from tunerkit.offline.model_folder import ModelFolder

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    """A model in two files, the config of which says nothing."""
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    for name in "ab":
        save_file({name: torch.ones(2)}, tmp_path / f"{name}.safetensors")
    write_index(tmp_path, {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}})
    return tmp_path


def write_index(folder, values):
    (folder / INDEX).write_text(json.dumps(values), encoding="utf-8")


def test_shards(folder):
    found = ModelFolder.open(folder)
    assert {key: file.path.name for key, file in found.where.items()} == {"a": "a.safetensors", "b": "b.safetensors"}


def test_one_file_comes_first_as_in_transformers(folder):
    save_file({"c": torch.ones(2)}, folder / "model.safetensors")
    found = ModelFolder.open(folder)
    assert (list(found.where), found.index) == (["c"], None)
    assert [path.name for path in found.others()[1]] == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize(
    "places", [None, [], {}, {"a": 3}, {"a": "../a.safetensors"}, {"a": "/a"}, {"a": "sub/a.safetensors"}]
)
def test_an_index_that_names_no_files(folder, places):
    write_index(folder, {"weight_map": places})
    with pytest.raises(CheckpointError, match="has no weight_map that names a file beside it"):
        ModelFolder.open(folder)


def test_an_index_that_does_not_agree_with_its_files(folder):
    places = {"a": "a.safetensors", "b": "b.safetensors"}
    write_index(folder, {"weight_map": {**places, "c": "b.safetensors"}})
    with pytest.raises(CheckpointError, match="names tensors that its files lack: 'c'"):
        ModelFolder.open(folder)
    write_index(folder, {"weight_map": {**places, "c": "c.safetensors"}})
    with pytest.raises(CheckpointNotFoundError, match=r"names files that are not there: 'c.safetensors'"):
        ModelFolder.open(folder)
    write_index(folder, {"weight_map": places})
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, folder / "b.safetensors")
    with pytest.raises(CheckpointError, match="hold the same tensors: 'a'"):
        ModelFolder.open(folder)


@pytest.mark.parametrize(
    ("text", "match"),
    [("{", "is not valid JSON"), ("[]", "holds a JSON list"), ("\udcff", "is not valid JSON in UTF-8")],
)
def test_a_broken_config(folder, text, match):
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=match):
        ModelFolder.open(folder)


def test_a_config_that_may_not_be_read(folder, monkeypatch):
    def fail(self, **_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(folder), "read_text", fail)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        ModelFolder.open(folder)


def test_no_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"There is no 'config.json' in .* which holds: 'a.safetensors'"):
        ModelFolder.open(folder)
    (folder / "adapter_config.json").touch()
    with pytest.raises(CheckpointNotFoundError, match=r"'adapter_config.json' is there, so this is an adapter"):
        ModelFolder.open(folder)
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(CheckpointNotFoundError, match="which is empty"):
        ModelFolder.open(folder)


def test_a_model_with_an_adapter_beside_it(folder):
    (folder / "adapter_config.json").touch()
    with pytest.raises(CheckpointError, match="would load that adapter on top"):
        ModelFolder.open(folder)


def test_no_safetensors(folder):
    (folder / INDEX).unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"There is neither 'model.safetensors' nor"):
        ModelFolder.open(folder)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointNotFoundError, match=r"a pickle.*convert it once: .* `save_pretrained`"):
        ModelFolder.open(folder)
