from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from tunerkit.errors import CheckpointError
from tunerkit.offline import tensor_file
from tunerkit.offline.tensor_file import TensorFile
from tunerkit.sums import split_rows

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.int8), "none": torch.zeros(0, 2)}


@pytest.fixture
def path(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt", "of": "me"})
    return tmp_path / "x.safetensors"


def test_header(path):
    file = TensorFile.open(path)
    assert file.metadata == {"format": "pt", "of": "me"}
    assert {key: (entry.dtype, entry.shape, entry.size, entry.count) for key, entry in file.entries.items()} == {
        "a": ("F32", (2, 3), 24, 6),
        "b": ("I8", (3,), 3, 3),
        "none": ("F32", (0, 2), 0, 0),
    }
    starts = [entry.start for entry in file.entries.values()]
    assert starts == sorted(starts)


def test_no_metadata(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors")
    assert TensorFile.open(tmp_path / "x.safetensors").metadata == {}


@pytest.mark.parametrize("key", TENSORS)
def test_tensors_and_bytes(path, key, monkeypatch):
    monkeypatch.setattr(tensor_file, "CHUNK", 5)
    file = TensorFile.open(path)
    assert torch.equal(file.read(key), TENSORS[key])
    assert b"".join(file.chunks(key)) == TENSORS[key].numpy().tobytes()


@pytest.mark.parametrize("block", [1, 3, 6])
def test_rows(path, block, monkeypatch):
    monkeypatch.setattr("tunerkit.sums._BLOCK", block)
    file = TensorFile.open(path)
    for key in ("a", "b"):
        found, wanted = list(file.rows(key)), split_rows(TENSORS[key])
        assert len(found) == len(wanted)
        assert all(map(torch.equal, found, wanted))


def test_a_tensor_that_was_read_is_private(path):
    file = TensorFile.open(path)
    before = path.read_bytes()
    file.read("a").fill_(7)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"version https://git-lfs", r"\(23 bytes\) is a pointer of Git LFS"),
        (b"\x10" + bytes(7) + b"{}", r"\(10 bytes\) is not a whole safetensors file"),
    ],
)
def test_no_such_file(path, content, words):
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        TensorFile.open(path)


def test_a_file_that_changes_meanwhile(path):
    file = TensorFile.open(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="not a whole"):
        file.read("a")
    with pytest.raises(CheckpointError, match="became shorter while it was read"):
        list(file.chunks(list(file.entries)[-1] if file.entries["b"].start > file.entries["a"].start else "a"))
    path.unlink()
    for call in (lambda: file.read("a"), lambda: list(file.chunks("a")), lambda: TensorFile.open(path)):
        with pytest.raises(CheckpointError, match="cannot be read"):
            call()
