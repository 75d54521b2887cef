"""A disk that is full or may not be written to, and what stands where a folder should be: what was there is whole."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from disk_faults import Faults, Killed, fail_everywhere

from tunerkit.checkpoint.encoding import bytes_of
from tunerkit.checkpoint.files import read_checkpoint
from tunerkit.checkpoint.writing import write_checkpoint
from tunerkit.errors import CheckpointError
from tunerkit.offline import writing
from tunerkit.offline.tensor_file import Entry, TensorFile
from tunerkit.offline.writing import TensorWriter, check_out, new_folder, write_file

FULL = OSError(errno.ENOSPC, "No space left on device")


def save(path, number, size=3):
    write_checkpoint(path, {"r": number}, {"a": torch.full((size,), float(number))}, {})


def loaded(path):
    config, tensors, _ = read_checkpoint(path)
    assert set(tensors["a"].tolist()) == {config["r"]}
    return config["r"]


def names(path):
    return sorted(entry.name for entry in path.iterdir())


def refusal(call):
    with pytest.raises(CheckpointError) as raised:
        call()
    return str(raised.value)


@contextlib.contextmanager
def as_nobody():
    """Within the block the rights of files count, also for a superuser."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_place():
    """A folder that everybody can reach."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX rights")
def test_a_read_only_folder(open_place):
    save(open_place / "adapter", 1)
    (open_place / "adapter").chmod(0o555)
    with as_nobody():
        message = refusal(lambda: save(open_place / "adapter", 2))
        inside = refusal(lambda: save(open_place / "adapter" / "new", 2))
    for text in (message, inside):
        assert "(Permission denied). What was there before is unchanged: free some space, get write access" in text
        assert str(open_place / "adapter") in text
    assert loaded(open_place / "adapter") == 1
    assert len(names(open_place / "adapter")) == 2
    (open_place / "adapter").chmod(0o755)


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a file system")
def test_a_disk_that_is_full(tmp_path):
    """Every size from one that fits to one that does not, so that each of the writes is the first that fails."""
    mount = [shutil.which("mount") or "", "-t", "tmpfs", "-o", "size=64k", "none", str(tmp_path)]
    mounted = mount[0] and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    if not mounted:
        pytest.skip("nothing may be mounted here")
    outcomes = []
    try:
        save(tmp_path, 1)
        for pages in range(16):
            size = (pages + 1) * 1024 - 40
            number = 2 + pages
            try:
                save(tmp_path, number, size)
            except CheckpointError as error:
                assert "(No space left on device). What was there before is unchanged" in str(error)  # noqa: PT017
                number = 0
            assert loaded(tmp_path) == (number or max(outcomes))
            assert len(names(tmp_path)) == 2
            outcomes.append(number)
        (tmp_path / "adapter_model.safetensors").unlink()
    finally:
        subprocess.run([shutil.which("umount"), str(tmp_path)], check=True)
    assert set(outcomes) > {0, 2}


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "is a file, and a checkpoint is a folder with two files: choose" in refusal(
        lambda: save(tmp_path / "file", 1)
    )
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("at", range(1, 12))
def test_a_folder_that_vanishes(tmp_path, at):
    """Before the k-th operation somebody removes it: the save fails in our words, or has made it anew."""
    path = tmp_path / "adapter"
    save(path, 1)

    class Vanishing(Faults):
        def wrapped(self, operation):
            def call(*args, **options):
                self.count += 1
                if self.count == self.at:
                    shutil.rmtree(path, ignore_errors=True)
                return operation(*args, **options)

            return call

    with pytest.MonkeyPatch.context() as patch:
        Vanishing(patch, None, at, after=False)
        with contextlib.suppress(CheckpointError):
            save(path, 2)
    assert not path.exists() or names(path) == [] or loaded(path) == 2


def test_links_in_a_circle(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    assert "loop'" in refusal(lambda: save(tmp_path / "loop", 1))
    assert "is a link that leads nowhere" in refusal(lambda: check_out(tmp_path / "loop", overwrite=True))
    assert names(tmp_path) == ["loop"]


class TestMergedFolder:
    """What `tunerkit merge` writes, with the k-th operation failing for every k."""

    @pytest.fixture(params=[True, False], ids=["exchange", "two renames"])
    def swap(self, request, monkeypatch):
        if not request.param:
            monkeypatch.setattr(writing, "_exchange", lambda *_: False)
        return request.param

    def write(self, out, number):
        with new_folder(out) as work:
            writer = TensorWriter(work / "model.safetensors", {"a": Entry("F32", (2,), 0, 8)}, {})
            writer.write("a", [bytes_of(torch.full((2,), float(number)))])
            writer.finish()
            write_file(work / "tokenizer.json", str(number).encode())
            write_file(work / "config.json", json.dumps({"number": number}).encode())

    def read(self, out):
        number = json.loads((out / "config.json").read_bytes())["number"]
        assert TensorFile.open(out / "model.safetensors").read("a").tolist() == [number] * 2
        assert (out / "tokenizer.json").read_text() == str(number)
        return number

    def runs(self, path, raised, *, after, old):
        def prepare(folder):
            out = folder / "out"
            if old:
                self.write(out, 1)
            return out

        return fail_everywhere(path, raised, lambda out: self.write(out, 2), after=after, prepare=prepare)

    @pytest.mark.parametrize("after", [False, True])
    @pytest.mark.parametrize("old", [False, True])
    @pytest.mark.parametrize("raised", [FULL, KeyboardInterrupt()])
    def test_fails(self, tmp_path, raised, after, old, swap):
        for out, outcome in self.runs(tmp_path, raised, after=after, old=old):
            if isinstance(outcome, CheckpointError):
                assert "(No space left on device" in str(outcome)
                assert "What was there before is unchanged: free some space, get access" in str(outcome)
                assert out.exists() == old
            if out.exists():
                number = self.read(out)
                assert number == 1 or not isinstance(outcome, CheckpointError)
                assert names(out.parent) == ["out"] or number == 2

    @pytest.mark.parametrize("after", [False, True])
    def test_is_killed(self, tmp_path, after, swap):
        seen, seen_whole = set(), set()
        for out, outcome in self.runs(tmp_path, Killed(), after=after, old=True):
            assert isinstance(outcome, (Killed, type(None)))
            if swap:
                seen.add(self.read(out))
            for path in out.parent.iterdir():
                # Without a whole config it is no model to anybody; with one it must be a whole model.
                with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
                    json.loads((path / "config.json").read_bytes())
                    seen_whole.add(self.read(path))
        assert seen == ({1, 2} if swap else set())
        assert seen_whole == {1, 2}
