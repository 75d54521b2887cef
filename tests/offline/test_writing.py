from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from tunerkit.checkpoint.encoding import bytes_of
from tunerkit.errors import CheckpointError
from tunerkit.offline import writing
from tunerkit.offline.tensor_file import TensorFile
from tunerkit.offline.writing import TensorWriter, new_folder

TENSORS = {
    "one": torch.randn(3, 5),
    "half": torch.randn(7).to(torch.bfloat16),
    "turned": torch.randn(4, 2).T,
    "number": torch.tensor(3),
    "none": torch.zeros(0),
}


def test_what_safetensors_writes_and_reads(tmp_path):
    save_file({key: value.contiguous() for key, value in TENSORS.items()}, tmp_path / "a", metadata={"ü": '"x"'})
    file = TensorFile.open(tmp_path / "a")
    writer = TensorWriter(tmp_path / "b", file.entries, file.metadata)
    for key in reversed(list(file.entries)):
        writer.write(key, [bytes_of(TENSORS[key])])
    writer.finish()
    assert (tmp_path / "b").stat().st_size == writer.size
    again = load_file(tmp_path / "b")
    assert all(torch.equal(again[key], value) for key, value in TENSORS.items())
    assert again.keys() == TENSORS.keys()
    assert TensorFile.open(tmp_path / "b").metadata == {"ü": '"x"'}


@pytest.mark.parametrize("key", TENSORS)
def test_bytes_are_counted_by_their_length(key):
    assert len(bytes_of(TENSORS[key])) == TENSORS[key].nbytes


class TestNewFolder:
    def test_it_is_there_only_when_it_is_whole(self, tmp_path):
        out = tmp_path / "a" / "b"
        with new_folder(out) as work:
            (work / "sub").mkdir()
            writing.write_file(work / "sub" / "x", b"1")
            assert not out.exists()
        assert (out / "sub" / "x").read_bytes() == b"1"
        assert [path.name for path in out.parent.iterdir()] == ["b"]

    def test_nothing_is_left_of_what_fails(self, tmp_path):
        def fill(work):
            (work / "x").mkdir()
            raise KeyError

        with pytest.raises(KeyError), new_folder(tmp_path / "a" / "b") as work:
            fill(work)
        assert list(tmp_path.iterdir()) == []

    def test_what_was_there_comes_back_when_the_rename_fails(self, tmp_path, monkeypatch):
        out = tmp_path / "out"
        out.mkdir()
        (out / "old").touch()
        rename = type(out).replace

        def fail(self, target):
            if target == out and self.suffix == ".tmp":
                raise PermissionError(13, "Permission denied", str(target))
            return rename(self, target)

        monkeypatch.setattr(type(out), "replace", fail)
        monkeypatch.setattr(writing, "_exchange", lambda *_: False)
        with (
            pytest.raises(
                CheckpointError, match=r"Permission denied, at '.*out'\). What was there before is unchanged"
            ),
            new_folder(out),
        ):
            pass
        assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["out", "out/old"]
