"""Reading a checkpoint's files: what is there, what is broken, and saves that were cut."""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tunerkit.checkpoint import files
from tunerkit.checkpoint.files import (
    CONFIG_NAME,
    SAVE_ID_KEY,
    WEIGHTS_NAME,
    read_checkpoint,
    read_config,
    read_metadata,
    read_tensors,
    temporary,
)
from tunerkit.checkpoint.folder import check_folder
from tunerkit.checkpoint.writing import write_checkpoint
from tunerkit.errors import CheckpointError, CheckpointNotFoundError

OLD = {"peft_type": "TOY", "r": 1}
NEW = {"peft_type": "TOY", "r": 2}
WHOLE = safetensors.torch.save(
    {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.bfloat16), "i": torch.tensor([7])},
    metadata={"format": "pt"},
)


def error(call, kind=CheckpointError):
    """Return the message that `call()` fails with."""
    with pytest.raises(CheckpointError) as raised:
        call()
    assert type(raised.value) is kind
    return str(raised.value)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "adapter"
    path.mkdir()
    (path / CONFIG_NAME).write_text(json.dumps(OLD))
    (path / WEIGHTS_NAME).write_bytes(WHOLE)
    return path


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter")
    (path / CONFIG_NAME).write_text(json.dumps(OLD))
    return path


def cut_save(path):
    """Leave `path` as a save of `NEW` does that is killed between its two renames; return the config's temporary."""
    old = (path / CONFIG_NAME).read_bytes()
    write_checkpoint(path, NEW, {"a": torch.full((2,), 2.0)}, {})
    pending = path / temporary(CONFIG_NAME, read_metadata(path)[SAVE_ID_KEY])
    (path / CONFIG_NAME).rename(pending)
    (path / CONFIG_NAME).write_bytes(old)
    return pending


class TestReading:
    def test_reads_what_is_there(self, folder):
        assert read_config(str(folder)) == OLD
        assert read_metadata(folder) == {"format": "pt"}
        tensors = read_tensors(folder)
        assert list(tensors) == ["a.weight", "b", "i"]
        assert torch.equal(tensors["a.weight"], torch.arange(6.0).reshape(2, 3))
        assert tensors["b"].dtype == torch.bfloat16
        config, tensors, metadata = read_checkpoint(folder)
        assert (config, list(tensors), metadata) == (OLD, ["a.weight", "b", "i"], {"format": "pt"})

    def test_tensors_may_be_written_to_without_changing_the_file(self, folder):
        read_tensors(folder)["a.weight"].fill_(9)
        assert (folder / WEIGHTS_NAME).read_bytes() == WHOLE

    def test_metadata_may_be_missing(self, folder):
        (folder / WEIGHTS_NAME).write_bytes(safetensors.torch.save({"a": torch.ones(1)}))
        assert read_metadata(folder) == {}
        assert read_checkpoint(folder).metadata == {}

    def test_device(self, folder):
        assert read_tensors(folder, "meta")["i"].device.type == "meta"
        assert read_checkpoint(folder, torch.device("meta")).tensors["i"].is_meta

    def test_a_device_that_is_not_there_is_not_blamed_on_the_file(self, folder):
        with pytest.raises(RuntimeError, match="nowhere") as raised:
            read_tensors(folder, "nowhere")
        assert not isinstance(raised.value, CheckpointError)

    def test_byte_order_mark_of_an_editor(self, folder):
        (folder / CONFIG_NAME).write_text(json.dumps(NEW), encoding="utf-8-sig")
        assert read_config(folder) == NEW


class TestFolder:
    def test_missing_with_similar_siblings(self, folder):
        message = error(lambda: check_folder(folder.parent / "adaptor"), CheckpointNotFoundError)
        assert message == (
            f"There is no folder '{folder.parent / 'adaptor'}'. Similar folders in '{folder.parent}': 'adapter'. Check "
            "the path."
        )

    def test_missing_without_similar_siblings(self, folder):
        message = error(lambda: check_folder(folder.parent / "zzz" / "x"), CheckpointNotFoundError)
        assert f"What exists of its path is '{folder.parent}', with the folders: 'adapter'." in message

    def test_missing_below_a_file(self, folder):
        message = error(lambda: check_folder(folder / CONFIG_NAME / "x"), CheckpointNotFoundError)
        assert f"What exists of its path is '{folder}', with the folders: none." in message

    def test_missing_in_a_folder_that_cannot_be_listed(self, folder, monkeypatch):
        monkeypatch.setattr(Path, "iterdir", partial(fail, PermissionError(13, "Permission denied")))
        assert "with the folders: none." in error(lambda: check_folder(folder.parent / "x"), CheckpointNotFoundError)

    @pytest.mark.parametrize("name", ["some-user/my_adapter.v2", Path("some-user/my_adapter.v2")])
    def test_hub_id(self, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        message = error(lambda: read_config(name), CheckpointNotFoundError)
        assert message == (
            "There is no folder 'some-user/my_adapter.v2' here, and it looks like the id of a repository on the "
            "Hugging Face Hub. Here only a folder will do: download it first, for example with "
            "`huggingface_hub.snapshot_download('some-user/my_adapter.v2')`, and pass the folder that this returns."
        )

    @pytest.mark.parametrize("name", ["outputs/adapter", "./u/name", "../u/name", "a/b/c", "name", "u/na me"])
    def test_what_is_no_hub_id(self, name, tmp_path, monkeypatch):
        (tmp_path / "here" / "outputs").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / "here")
        assert "Hugging Face" not in error(lambda: read_config(name), CheckpointNotFoundError)

    def test_a_folder_that_looks_like_a_hub_id_is_read(self, folder, monkeypatch):
        monkeypatch.chdir(folder.parent.parent)
        assert read_config(f"{folder.parent.name}/adapter") == OLD

    def test_file(self, folder):
        path = folder / CONFIG_NAME
        message = f"'{path}' is a file; a checkpoint is loaded from its folder: pass '{folder}'."
        assert error(lambda: read_tensors(path)) == message

    def test_path_that_the_system_refuses(self, tmp_path):
        assert "cannot be read: File name too long." in error(lambda: check_folder(tmp_path / ("x" * 300)))

    @pytest.mark.parametrize("path", [None, 3, b"bytes"])
    def test_no_path(self, path):
        assert f"{path!r} is of type {type(path).__name__}." in error(lambda: check_folder(path))

    @pytest.mark.parametrize("path", ["", "a\0b"])
    def test_no_legal_path(self, path):
        message = f"{path!r} is not the path of a checkpoint's folder; for the current folder pass '.'."
        assert error(lambda: check_folder(path)) == message


class TestMissingFiles:
    @pytest.mark.parametrize(("name", "read"), [(CONFIG_NAME, read_config), (WEIGHTS_NAME, read_tensors)])
    def test_message(self, folder, name, read):
        (folder / name).unlink()
        rest = WEIGHTS_NAME if name == CONFIG_NAME else CONFIG_NAME
        message = (
            f"There is no '{name}' in '{folder}', which holds: '{rest}'. Pass a folder that holds both "
            f"'{CONFIG_NAME}' and '{WEIGHTS_NAME}'."
        )
        assert error(lambda: read(folder), CheckpointNotFoundError) == message
        assert error(lambda: read_checkpoint(folder), CheckpointNotFoundError) == message

    def test_checkpoints_one_level_below(self, folder):
        message = error(lambda: read_config(folder.parent), CheckpointNotFoundError)
        assert message.endswith("which holds: 'adapter'. Checkpoints are in its folders 'adapter': pass one of them.")

    def test_empty_folder(self, tmp_path):
        (tmp_path / "empty").mkdir()
        message = error(lambda: read_config(tmp_path / "empty"), CheckpointNotFoundError)
        assert message == (
            f"There is no '{CONFIG_NAME}' in '{tmp_path / 'empty'}', which is empty. Pass a folder that holds both "
            f"'{CONFIG_NAME}' and '{WEIGHTS_NAME}'."
        )

    @pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin.index.json", "trainer_state.json"])
    def test_whole_model(self, folder, name):
        (folder / CONFIG_NAME).unlink()
        (folder / name).touch()
        assert "whole model" not in error(lambda: read_config(folder), CheckpointNotFoundError)
        (folder / WEIGHTS_NAME).unlink()
        assert error(lambda: read_checkpoint(folder), CheckpointNotFoundError) == (
            f"There is no '{WEIGHTS_NAME}' in '{folder}', which holds: '{name}'. This looks like a whole model or a "
            f"trainer's checkpoint, not an adapter. Pass a folder that holds both '{CONFIG_NAME}' and '{WEIGHTS_NAME}'."
        )

    def test_pickle_is_never_read(self, folder):
        (folder / WEIGHTS_NAME).unlink()
        torch.save({"a": torch.ones(1)}, folder / "adapter_model.bin")
        message = error(lambda: read_tensors(folder), CheckpointNotFoundError)
        assert message.startswith(f"'{folder}' holds its tensors as 'adapter_model.bin', a pickle")
        assert "load the checkpoint with PEFT and write it again with PEFT's `save_pretrained`" in message

    @pytest.mark.parametrize(("name", "read"), [(CONFIG_NAME, read_config), (WEIGHTS_NAME, read_tensors)])
    def test_folder_where_a_file_should_be(self, folder, name, read):
        (folder / name).unlink()
        (folder / name).mkdir()
        assert error(lambda: read(folder)).startswith(f"'{folder / name}' cannot be read: ")


class TestBrokenTensors:
    def test_every_truncation(self, scratch):
        for size in range(len(WHOLE)):
            (scratch / WEIGHTS_NAME).write_bytes(WHOLE[:size])
            message = error(lambda: read_tensors(scratch))
            assert f"'{scratch / WEIGHTS_NAME}'" in message
            assert ("is empty (0 bytes)" if size == 0 else f"({size} bytes) is not a whole safetensors file") in message
            assert error(lambda: read_metadata(scratch)) == message
            assert error(lambda: read_checkpoint(scratch)) == message

    def test_message(self, folder):
        (folder / WEIGHTS_NAME).write_bytes(WHOLE[:-1])
        assert re.search(
            r"is not a whole safetensors file \(.+\)\. Most likely a download or a copy was cut short: fetch or save "
            r"the checkpoint again\.$",
            error(lambda: read_tensors(folder)),
        )

    @given(st.dictionaries(st.integers(0, len(WHOLE) - 1), st.integers(1, 255), min_size=1, max_size=4))
    @settings(deadline=None)
    def test_flipped_bytes(self, scratch, flips):
        data = bytearray(WHOLE)
        for place, mask in flips.items():
            data[place] ^= mask
        read_anything(scratch, bytes(data))

    @given(st.binary(max_size=64), st.booleans())
    @settings(deadline=None)
    def test_any_bytes(self, scratch, data, framed):
        read_anything(scratch, struct.pack("<Q", len(data)) + data if framed else data)

    @pytest.mark.parametrize("dtype", ["F8_E8M0", "F4", "F6_E2M3", "C64", "U64", "BOOL", "NEW_TYPE"])
    def test_any_dtype(self, scratch, dtype):
        header = json.dumps({"a": {"dtype": dtype, "shape": [8], "data_offsets": [0, 8]}}).encode()
        for size in (4, 6, 8, 64):
            framed = header.replace(b"8]}}", b"%d]}}" % size)
            read_anything(scratch, struct.pack("<Q", len(framed)) + framed + bytes(size))

    @pytest.mark.parametrize("name", [WEIGHTS_NAME, CONFIG_NAME])
    def test_git_lfs_pointer(self, folder, name):
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1234\n"
        (folder / name).write_bytes(pointer)
        assert error(lambda: read_checkpoint(folder)) == (
            f"'{folder / name}' ({len(pointer)} bytes) is a pointer of Git LFS, not the file itself: run `git lfs "
            "pull` in the repository it comes from, or download the file."
        )


def read_anything(folder, data):
    """Read tensors from any bytes: nothing but a `CheckpointError` may come out, or well-formed tensors."""
    (folder / WEIGHTS_NAME).write_bytes(data)
    try:
        config, tensors, metadata = read_checkpoint(folder)
    except CheckpointError as raised:
        assert WEIGHTS_NAME in str(raised)  # noqa: PT017 - either outcome is right
    else:
        assert config == OLD
        assert all(isinstance(text, str) for pair in metadata.items() for text in pair)
        assert all(tensor.contiguous().nbytes <= len(data) for tensor in tensors.values())


class TestBrokenConfig:
    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (
                b"",
                "' is empty (0 bytes). Most likely a copy was cut short or the disk was full: fetch or save",
            ),
            (b'{"r": 1,\n "s" 2}', "' (16 bytes) is not valid JSON: Expecting ':' delimiter at line 2, column 6. "),
            (b'{"r": 1', "' (7 bytes) is not valid JSON: Expecting ',' delimiter at line 1, column 8. "),
            (b"[1]", '\' (3 bytes) holds a JSON value of type list, and a config is an object: {"peft_type": ...}. '),
            (b"null", "' (4 bytes) holds a JSON value of type NoneType, and a config is an object"),
            (
                b'{"r": "\xff"}',
                "' (10 bytes) is not text in UTF-8: byte 7 is 0xff (invalid start byte). Mend the file, or ",
            ),
            (
                b'{"r": 1, "s": 2, "r": 3}',
                "' (24 bytes) holds more than once: 'r'. Which value counts is not clear: keep",
            ),
            (b'{"r": {"q": 1, "q": 1}}', "holds more than once: 'q'."),
            (b'{"r": ' + b"[" * 100_000, "' (100006 bytes) is nested too deeply for the config of an adapter. "),
            (b'{"r": ' + b"9" * 5000 + b"}", "' (5007 bytes) holds a value that cannot be read (Exceeds the limit "),
        ],
        ids=["empty", "line", "cut", "list", "null", "latin", "doubled", "doubled below", "nested", "number"],
    )
    def test_message(self, folder, data, message):
        (folder / CONFIG_NAME).write_bytes(data)
        text = error(lambda: read_config(folder))
        assert text.startswith(f"'{folder / CONFIG_NAME}'")
        assert message in text

    @given(st.one_of(st.binary(max_size=40), st.text(max_size=40).map(str.encode)))
    @settings(deadline=None)
    def test_any_bytes(self, scratch, data):
        (scratch / CONFIG_NAME).write_bytes(data)
        try:
            config = read_config(scratch)
        except CheckpointError as raised:
            assert CONFIG_NAME in str(raised)  # noqa: PT017 - either outcome is right
        else:
            assert isinstance(config, dict)
        (scratch / CONFIG_NAME).write_text(json.dumps(OLD))

    def test_numbers_as_python_writes_them(self, folder):
        (folder / CONFIG_NAME).write_text(json.dumps({"r": math.inf}))
        assert read_config(folder) == {"r": math.inf}


class TestCutSave:
    """The config's temporary lies beside tensors that carry its id."""

    def test_is_finished_by_reading(self, folder):
        pending = cut_save(folder)
        assert read_config(folder) == NEW
        assert not pending.exists()
        assert json.loads((folder / CONFIG_NAME).read_bytes()) == NEW
        assert read_checkpoint(folder).config == NEW

    def test_first_save_into_a_folder(self, folder):
        cut_save(folder)
        (folder / CONFIG_NAME).unlink()
        assert read_checkpoint(folder).config == NEW

    def test_survives_copying_all_that_a_shell_sees(self, folder, tmp_path):
        cut_save(folder)
        (tmp_path / "copy").mkdir()
        for path in folder.glob("[!.]*"):
            shutil.copy(path, tmp_path / "copy")
        assert read_config(tmp_path / "copy") == NEW

    def test_is_used_where_nothing_may_be_written(self, folder, monkeypatch):
        pending = cut_save(folder)
        monkeypatch.setattr(Path, "replace", partial(fail, PermissionError(13, "Permission denied")))
        assert read_config(folder) == NEW
        assert pending.exists()
        assert json.loads((folder / CONFIG_NAME).read_bytes()) == OLD

    def test_two_readers_finish_at_the_same_time(self, folder, monkeypatch):
        cut_save(folder)
        replace = Path.replace

        def second(self, target):
            replace(self, target)
            return replace(self, target)

        monkeypatch.setattr(Path, "replace", second)
        assert read_config(folder) == NEW

    def test_finished_by_another_while_reading_read_only(self, folder, monkeypatch):
        cut_save(folder)
        replace, read_bytes = Path.replace, Path.read_bytes

        def other(self):
            if self.name != CONFIG_NAME:
                replace(self, folder / CONFIG_NAME)
            return read_bytes(self)

        monkeypatch.setattr(Path, "replace", partial(fail, PermissionError(13, "Permission denied")))
        monkeypatch.setattr(Path, "read_bytes", other)
        assert read_config(folder) == NEW

    def test_temporary_of_another_save_is_left_alone(self, folder):
        (folder / temporary(CONFIG_NAME, "0" * 32)).write_text(json.dumps(NEW))
        assert read_config(folder) == OLD
        write_checkpoint(folder, OLD, {"a": torch.ones(1)}, {})
        assert read_config(folder) == OLD
        assert (folder / temporary(CONFIG_NAME, "0" * 32)).exists()

    def test_editing_by_hand_stays_legal(self, folder):
        write_checkpoint(folder, OLD, {"a": torch.ones(1)}, {})
        (folder / CONFIG_NAME).write_text(json.dumps(NEW))
        assert read_checkpoint(folder).config == NEW

    @pytest.mark.parametrize("save_id", ["../outside", "0" * 31, "0" * 32 + "\n", "A" * 32, ""])
    def test_an_id_from_elsewhere_is_no_path(self, folder, save_id):
        outside = folder.parent / "outside.tmp"
        (folder / f"{CONFIG_NAME}...").mkdir()
        outside.write_text(json.dumps(NEW))
        (folder / WEIGHTS_NAME).write_bytes(safetensors.torch.save({"a": torch.ones(1)}, {SAVE_ID_KEY: save_id}))
        assert files.saved_id(folder) is None
        assert read_config(folder) == OLD
        assert outside.exists()

    def test_a_save_that_comes_in_between_gives_the_new_pair(self, folder, monkeypatch):
        write_checkpoint(folder, OLD, {"a": torch.tensor([1.0])}, {})
        saves = [lambda: write_checkpoint(folder, NEW, {"a": torch.tensor([2.0])}, {})]

        def interrupted(path):
            while saves:
                saves.pop()()
            return read_config(path)

        monkeypatch.setattr(files, "read_config", interrupted)
        config, tensors, metadata = read_checkpoint(folder)
        assert (config, tensors["a"].item()) == (NEW, 2.0)
        assert metadata == read_metadata(folder)


def fail(raised, *_args, **_options):
    raise raised
