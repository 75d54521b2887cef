"""Writing a checkpoint: the content, and what a folder holds when a save fails, is interrupted or is killed."""

from __future__ import annotations

import enum
import errno
import gc
import json
import os
import signal
import stat
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch
from disk_faults import Killed, fail_everywhere
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.save_and_load import load_peft_weights
from torch._subclasses.fake_tensor import FakeTensorMode

from tunerkit.checkpoint import encoding, files, folder, writing
from tunerkit.checkpoint.files import (
    CONFIG_NAME,
    SAVE_ID_KEY,
    TEMPORARY,
    WEIGHTS_NAME,
    read_checkpoint,
    read_config,
    read_metadata,
    read_tensors,
    temporary,
)
from tunerkit.checkpoint.writing import write_checkpoint
from tunerkit.errors import CheckpointError

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.uint16,
    torch.uint32,
    torch.uint64,
]

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda key: key != "__metadata__")
DRAWN = st.dictionaries(
    TEXTS,
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(1, 4), max_size=4), st.integers(0, 2**16), st.booleans()),
    max_size=5,
)


def save(path, number):
    write_checkpoint(path, {"r": number}, {"a": torch.full((3,), float(number))}, {"plugin": f"toy {number}"})


def save_two(path):
    save(path, 2)


def loaded(path):
    """Return the number that `save` wrote; the config, the tensors and the metadata must agree on it."""
    config, tensors, metadata = read_checkpoint(path)
    number = config["r"]
    assert tensors["a"].tolist() == [number] * 3
    assert metadata["plugin"] == f"toy {number}"
    assert json.loads((path / CONFIG_NAME).read_bytes()) == config
    return number


def names(path):
    return sorted(entry.name for entry in path.iterdir())


def error(call):
    """Return the message that `call()` fails with."""
    with pytest.raises(CheckpointError) as raised:
        call()
    assert type(raised.value) is CheckpointError
    return str(raised.value)


class TestContent:
    def test_files(self, tmp_path):
        save(tmp_path / "new" / "adapter", 1)
        path = tmp_path / "new" / "adapter"
        assert names(path) == [CONFIG_NAME, WEIGHTS_NAME]
        assert (path / CONFIG_NAME).read_text() == '{\n  "r": 1\n}'
        metadata = read_metadata(path)
        assert metadata == {"format": "pt", "plugin": "toy 1", SAVE_ID_KEY: metadata[SAVE_ID_KEY]}
        assert TEMPORARY.fullmatch(temporary(CONFIG_NAME, metadata[SAVE_ID_KEY]))

    def test_every_save_has_its_own_id(self, tmp_path):
        ids = set()
        for _ in range(3):
            save(tmp_path, 1)
            ids.add(files.saved_id(tmp_path))
        assert len(ids) == 3
        assert None not in ids

    def test_our_metadata_win(self, tmp_path):
        write_checkpoint(tmp_path, {}, {"a": torch.ones(1)}, {"format": "np", SAVE_ID_KEY: "mine"})
        assert read_metadata(tmp_path) == {"format": "pt", SAVE_ID_KEY: files.saved_id(tmp_path)}

    @pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
    def test_permissions_follow_the_umask(self, tmp_path):
        before = os.umask(0o027)
        try:
            save(tmp_path, 1)
        finally:
            os.umask(before)
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640

    @given(DRAWN)
    @settings(deadline=None, max_examples=50)
    def test_tensors_come_back_bit_for_bit(self, drawn):
        tensors = {key: random_tensor(*spec) for key, spec in drawn.items()}
        with tempfile.TemporaryDirectory() as name:
            write_checkpoint(name, {}, tensors, {})
            ours = {key: tensor.clone() for key, tensor in read_tensors(name).items()}
            theirs = safetensors.torch.load_file(Path(name, WEIGHTS_NAME))
        for back in (ours, theirs):
            assert back.keys() == tensors.keys()
            for key, tensor in tensors.items():
                assert back[key].dtype == tensor.dtype
                assert back[key].shape == tensor.shape
                assert bits(back[key]) == bits(tensor)

    @given(DRAWN, TEXTS)
    @settings(deadline=None, max_examples=50)
    def test_the_header_is_that_of_safetensors(self, drawn, text):
        tensors = {key: random_tensor(*spec) for key, spec in drawn.items()}
        ours = b"".join(map(bytes, encoding.encode_tensors(tensors, {text: "format"})))
        theirs = safetensors.torch.save({key: value.contiguous() for key, value in tensors.items()}, {text: "format"})
        header, expected = head(ours), head(theirs)
        assert header.keys() == expected.keys()
        assert header.pop("__metadata__") == expected.pop("__metadata__") == {text: "format"}
        end = 0
        for key, item in header.items():  # in their order and without gaps, each aligned
            start, stop = item["data_offsets"]
            assert start == end
            assert start % tensors[key].itemsize == 0
            assert (item["dtype"], item["shape"]) == (expected[key]["dtype"], expected[key]["shape"])
            end = stop
        dtypes = {tensor.dtype for tensor in tensors.values()}
        if len({dtype.itemsize for dtype in dtypes}) == len(dtypes):
            # Of dtypes that are equally wide safetensors puts one before the other, which nobody relies on.
            assert ours == theirs

    def test_bytes_are_little_endian_everywhere(self, tmp_path, monkeypatch):
        tensors = {str(dtype): random_tensor(dtype, [3], 0) for dtype in DTYPES}
        monkeypatch.setattr(sys, "byteorder", "big")  # so that the bytes there are taken for the wrong way round
        swapped = {key: bytes(encoding.bytes_of(tensor)) for key, tensor in tensors.items()}
        for key, tensor in tensors.items():
            width = tensor.itemsize // (1 + tensor.is_complex())
            assert swapped[key] == bytes(torch.tensor(bits(tensor)).view(-1, width).flip(1).flatten().tolist()), key

    def test_tensors_that_share_memory_or_are_not_contiguous(self, tmp_path):
        base = torch.arange(12.0).reshape(3, 4)
        tensors = {"base": base, "same": base, "part": base[1:], "turned": base.T, "wide": torch.ones(1).expand(2, 5)}
        write_checkpoint(tmp_path, {}, tensors, {})
        back = read_tensors(tmp_path)
        for key, tensor in tensors.items():
            assert torch.equal(back[key], tensor), key
        assert len({tensor.data_ptr() for tensor in back.values()}) == 5

    def test_parameters_and_lazily_conjugated_tensors(self, tmp_path):
        values = torch.complex(torch.ones(2), torch.ones(2))
        tensors = {
            "p": torch.nn.Parameter(torch.ones(2)),
            "c": values.conj(),
            "n": values.conj().imag,
        }
        write_checkpoint(tmp_path, {}, tensors, {})
        back = read_tensors(tmp_path)
        assert all(torch.equal(back[key], tensor) for key, tensor in tensors.items())

    def test_saving_over_the_mapped_file_that_the_tensors_lie_in(self, tmp_path):
        save(tmp_path, 1)
        tensors = read_tensors(tmp_path)
        write_checkpoint(tmp_path, {}, {"b": tensors["a"]}, {})
        assert tensors["a"].tolist() == [1, 1, 1]
        assert read_tensors(tmp_path)["b"].tolist() == [1, 1, 1]

    def test_peft_reads_it(self, tmp_path):
        tensors = {f"base_model.model.l.{i}": random_tensor(dtype, [2, 3], i) for i, dtype in enumerate(DTYPES)}
        write_checkpoint(tmp_path, {"peft_type": "TOY"}, tensors, {"plugin": "toy"})
        back = load_peft_weights(str(tmp_path), device="cpu")
        assert back.keys() == tensors.keys()
        assert all(bits(back[key]) == bits(tensor) for key, tensor in tensors.items())


def random_tensor(dtype, shape, seed, turned=False):
    """Return a tensor of random bits, NaN and subnormal numbers among them; its memory may be in another order."""
    width = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, [*shape, width], generator=torch.manual_seed(seed))
    tensor = raw.to(torch.uint8).view(dtype).reshape(shape)
    return tensor.permute(list(reversed(range(tensor.dim())))) if turned else tensor


def head(data):
    """Return the header of a file, whose tensors begin at a multiple of 8."""
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    return json.loads(data[8 : 8 + length])


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


class TestRefusedContent:
    """What cannot be saved is refused before anything is touched."""

    @pytest.fixture
    def path(self, tmp_path):
        save(tmp_path, 1)
        return tmp_path

    @pytest.mark.parametrize(
        ("tensor", "message"),
        [
            (
                torch.empty(0, 4),
                (
                    "These tensors would be saved empty: 'bad'. They have no elements here, as when sharding keeps "
                    "them elsewhere: gather them first."
                ),
            ),
            (
                torch.empty(2, device="meta"),
                "These tensors are on the meta device and hold no data: 'bad'. Load or initialise them first.",
            ),
            (
                torch.ones(2, 2).to_sparse(),
                "These tensors are sparse or quantised, which safetensors cannot hold: 'bad'. Make them dense.",
            ),
            (
                torch.ones(2, dtype=torch.complex128),
                (
                    "safetensors does not know the dtype of these tensors: 'bad' ('torch.complex128'). Turn them into "
                    "one that it knows, such as float32."
                ),
            ),
        ],
    )
    def test_tensors(self, path, tensor, message):
        before = (path / WEIGHTS_NAME).read_bytes()
        assert error(lambda: write_checkpoint(path, {}, {"ok": torch.ones(1), "bad": tensor}, {})) == message
        assert loaded(path) == 1
        assert (path / WEIGHTS_NAME).read_bytes() == before

    def test_metadata(self, path):
        message = error(lambda: write_checkpoint(path, {}, {"ok": torch.ones(1)}, {"version": 1}))
        assert message == "What stands beside the tensors in their file is text; this is not: '1'."
        assert loaded(path) == 1

    @pytest.mark.parametrize(("key", "text"), [("a\ud800", "b"), ("a", "b\ud800")])
    def test_text_that_is_none(self, path, key, text):
        message = error(lambda: write_checkpoint(path, {}, {key: torch.ones(1)}, {"plugin": text}))
        assert message == "The name of a tensor, or a text beside them, is not text in UTF-8: '\\ud800'."
        assert loaded(path) == 1

    def test_tensor_whose_numbers_cannot_be_read(self, path):
        with FakeTensorMode():
            fake = torch.ones(2)
        message = error(lambda: write_checkpoint(path, {}, {"bad": fake}, {}))
        assert message.startswith("The numbers of 'bad', a FakeTensor on cpu, cannot be read (")
        assert message.endswith("). Make it a plain tensor first.")
        assert names(path) == [CONFIG_NAME, WEIGHTS_NAME]
        assert loaded(path) == 1

    @pytest.mark.parametrize(
        ("value", "found"),
        [
            (torch.float32, "torch.float32, of type dtype"),
            ([1, {"x": object}], "<class 'object'>, of type type"),
            ({1: 2}, "{1: 2}, a dict with keys that are not strings"),
            (float("nan"), "nan, of type float"),
            ((float("-inf"),), "-inf, of type float"),
            (b"x" * 99, f"{b'x' * 99!r:.60}, of type bytes"),
        ],
    )
    def test_config(self, path, value, found):
        assert error(lambda: write_checkpoint(path, {"rank_pattern": value}, {}, {})) == (
            f"The value of 'rank_pattern' cannot be saved as JSON: it holds {found}. JSON holds strings, finite "
            "numbers, booleans, None, lists, and dicts with strings as keys: use one of those."
        )
        assert loaded(path) == 1

    def test_config_that_holds_itself(self, path):
        value = []
        value.append(value)
        message = "The value of 'x' cannot be saved: it holds itself or is nested over 50 deep. Flatten it."
        assert error(lambda: write_checkpoint(path, {"x": value}, {}, {})) == message

    @pytest.mark.parametrize("inside", [False, True])
    def test_file_where_the_folder_should_be(self, path, inside):
        target = path / CONFIG_NAME / "x" if inside else path / CONFIG_NAME
        message = error(lambda: save(target, 2))
        if inside:
            assert message.startswith(f"The checkpoint could not be written to '{target}' (")
        else:
            assert message == f"'{target}' is a file, and a checkpoint is a folder with two files: choose another path."
        assert loaded(path) == 1

    @pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
    def test_folder_where_a_file_should_be(self, path, name):
        (path / name).unlink()
        (path / name).mkdir()
        message = f"'{path / name}' is a folder where a file is to be written: remove it or choose another path."
        assert error(lambda: save(path, 2)) == message
        assert names(path) == [CONFIG_NAME, WEIGHTS_NAME]

    def test_no_path(self):
        assert error(lambda: save("", 1)).startswith("'' is not the path of a checkpoint's folder")


class Colour(str, enum.Enum):
    RED = "red"


class Loud(str):
    __slots__ = ()

    def __str__(self):
        return self.upper()


class TestConfigText:
    def test_values_become_those_of_json(self):
        config = {
            "z": {"b", "a"},
            "e": Colour.RED,
            "s": Loud("x"),
            "t": (1, 2),
            "m": {2, "a"},
            "n": None,
            "d": {"k": {3}},
        }
        text = encoding.config_text({**config, Loud("key"): True})
        assert json.loads(text) == {
            "z": ["a", "b"],
            "e": "red",
            "s": "x",
            "t": [1, 2],
            "m": ["a", 2],
            "n": None,
            "d": {"k": [3]},
            "key": True,
        }
        assert text == json.dumps(json.loads(text), indent=2, sort_keys=True)

    @given(
        st.dictionaries(
            st.text(),
            st.recursive(
                st.none()
                | st.booleans()
                | st.integers()
                | st.floats(allow_nan=False, allow_infinity=False)
                | st.text(),
                lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
                max_leaves=8,
            ),
            max_size=5,
        )
    )
    @settings(deadline=None, max_examples=50)
    def test_any_config_comes_back(self, config):
        with tempfile.TemporaryDirectory() as name:
            write_checkpoint(name, config, {"a": torch.ones(1)}, {})
            assert read_config(name) == config


def old_save(path):
    save(path, 1)
    return path


def cut_save(path):
    """Leave a save of 1 over one of 0 that was killed between its renames."""
    save(path, 0)
    old = (path / CONFIG_NAME).read_bytes()
    save(path, 1)
    (path / CONFIG_NAME).rename(path / temporary(CONFIG_NAME, files.saved_id(path)))
    (path / CONFIG_NAME).write_bytes(old)
    return path


def no_folder(path):
    return path / "new"


@pytest.mark.parametrize("after", [False, True])
class TestEveryOperation:
    @pytest.mark.parametrize("prepare", [old_save, cut_save])
    @pytest.mark.parametrize("raised", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
    def test_fails(self, tmp_path, raised, after, prepare):
        numbers = []
        for path, outcome in fail_everywhere(tmp_path, raised, save_two, after=after, prepare=prepare):
            if prepare is old_save:  # Already before anyone loads, for PEFT would finish nothing.
                assert names(path) == [CONFIG_NAME, WEIGHTS_NAME]
            numbers.append(loaded(path))
            assert names(path) == [CONFIG_NAME, WEIGHTS_NAME]
            if outcome is None:  # Only the removal of what others left may fail unnoticed.
                assert numbers[-1] == 2
            elif isinstance(raised, OSError):
                unchanged = "What was there before is unchanged" in str(outcome)
                assert isinstance(outcome, CheckpointError)
                assert outcome.__cause__ is raised
                assert unchanged == (numbers[-1] == 1)
                assert unchanged != ("The checkpoint is in" in str(outcome))
                assert "(No space left on device)" in str(outcome)
                assert str(path) in str(outcome)
            else:
                assert outcome is raised
        assert numbers == sorted(numbers)
        assert set(numbers) == {1, 2}

    @pytest.mark.parametrize("raised", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
    def test_fails_in_a_new_folder(self, tmp_path, raised, after):
        there = []
        for path, outcome in fail_everywhere(tmp_path, raised, save_two, after=after, prepare=no_folder):
            there.append(path.exists())
            if there[-1]:
                assert loaded(path) == 2
                assert names(path) == [CONFIG_NAME, WEIGHTS_NAME]
            else:
                assert outcome is not None
                assert not path.parent.exists()
        assert there == sorted(there)
        assert set(there) == {False, True}

    @pytest.mark.parametrize("prepare", [old_save, cut_save])
    def test_is_killed(self, tmp_path, after, prepare):
        numbers, leftovers = [], 0
        for path, outcome in fail_everywhere(tmp_path, Killed(), save_two, after=after, prepare=prepare):
            assert isinstance(outcome, Killed)
            left = [entry for entry in path.iterdir() if TEMPORARY.fullmatch(entry.name)]
            leftovers += len(left)
            numbers.append(loaded(path))
            for entry in path.iterdir():
                os.utime(entry, (0, 0))
            save(path, 3)
            assert loaded(path) == 3
            assert names(path) == [CONFIG_NAME, WEIGHTS_NAME]
        assert numbers == sorted(numbers)
        assert set(numbers) == {1, 2}
        assert leftovers > 5


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_interrupt_at_every_line(tmp_path):
    """Ctrl-C may hit between any two lines, not only in a call to the system."""
    save(tmp_path, 1)
    traced = {module.__file__ for module in (writing, encoding, files, folder)}
    number, seen = 1, set()
    for at in range(1, 1000):
        count = 0

        def trace(frame, event, _, at=at):
            nonlocal count
            if frame.f_code.co_filename not in traced:
                return None
            if event == "line":
                count += 1
                if count == at:
                    raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            save(tmp_path, number + 1)
        except KeyboardInterrupt:
            pass
        else:
            break
        finally:
            sys.settrace(before)
        now = loaded(tmp_path)
        assert now in {number, number + 1}
        assert names(tmp_path) == [CONFIG_NAME, WEIGHTS_NAME]
        seen.add(now - number)
        number = now
    gc.collect()  # What was interrupted just before `close`.
    assert count < at
    assert seen == {0, 1}


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX limits")
def test_disk_that_takes_no_more(tmp_path):
    import resource

    save(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        message = error(lambda: write_checkpoint(tmp_path, {}, {"a": torch.ones(10_000)}, {}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert message == (
        f"The checkpoint could not be written to '{tmp_path}' (File too large). What was there before is unchanged: "
        "free some space, get write access, or choose another folder."
    )
    assert loaded(tmp_path) == 1
    assert names(tmp_path) == [CONFIG_NAME, WEIGHTS_NAME]


def test_a_config_that_cannot_be_renamed_waits(tmp_path, monkeypatch):
    save(tmp_path, 1)
    replace = Path.replace

    def refused(self, target):
        if Path(target).name == CONFIG_NAME:
            raise PermissionError(13, "Permission denied")
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refused)
        assert error(lambda: save(tmp_path, 2)) == (
            f"The checkpoint is in '{tmp_path}' and loads, but the save did not end well (Permission denied) and may "
            "not outlast a power cut: check the disk and save again."
        )
        assert read_config(tmp_path) == {"r": 2}
    assert loaded(tmp_path) == 2


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs the names of open files")
def test_order_on_the_disk(tmp_path, monkeypatch):
    """Each step is synced before the next begins, or a power cut could keep a later one and lose an earlier one."""
    steps = []
    fsync, replace = os.fsync, Path.replace

    def synced(handle):
        steps.append(f"sync {Path(f'/proc/self/fd/{handle}').readlink().name.split('.')[0]}")
        fsync(handle)

    def renamed(self, target):
        steps.append(f"rename {Path(target).stem}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    save(tmp_path / "new", 1)
    assert steps == [
        "sync adapter_model",
        "sync adapter_config",
        "sync new",
        f"sync {tmp_path.name}",
        "rename adapter_model",
        "sync new",
        "rename adapter_config",
        "sync new",
    ]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EACCES])
def test_a_file_system_that_cannot_sync_folders(tmp_path, monkeypatch, code):
    opened = os.open

    def refused(path, flags, *args, **options):
        if Path(path) == tmp_path:
            raise OSError(code, "no")
        return opened(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", refused)
    save(tmp_path, 1)
    assert loaded(tmp_path) == 1


def test_windows_syncs_no_folder(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(os, "open", opened.append)
    monkeypatch.setattr(writing.os, "name", "nt")
    writing.sync_folders([tmp_path])
    assert opened == []


class TestOthersAtTheSameTime:
    @pytest.mark.parametrize("moment", ["after the tensors", "before the config"])
    def test_a_reader_finishes_the_save_before_the_writer(self, tmp_path, monkeypatch, moment):
        save(tmp_path, 1)
        replace, read = Path.replace, []

        def and_read(self, target):
            if moment == "before the config" and Path(target).name == CONFIG_NAME and not read:
                read.append(None)
                read[0] = read_config(tmp_path)
            result = replace(self, target)
            if moment == "after the tensors" and Path(target).name == WEIGHTS_NAME:
                read.append(read_config(tmp_path))
            return result

        monkeypatch.setattr(Path, "replace", and_read)
        save(tmp_path, 2)
        assert read == [{"r": 2}]
        assert loaded(tmp_path) == 2

    def test_a_save_that_was_cut_is_finished_before_its_tensors_go(self, tmp_path, monkeypatch):
        cut_save(tmp_path)
        replace = Path.replace

        def refused(self, target):
            if Path(target).name == WEIGHTS_NAME:
                raise PermissionError(13, "Permission denied")
            return replace(self, target)

        monkeypatch.setattr(Path, "replace", refused)
        error(lambda: save(tmp_path, 2))
        assert loaded(tmp_path) == 1

    def test_readers_and_writers_in_threads(self, tmp_path):
        save(tmp_path, 1)
        problems, done = [], threading.Event()

        def read():
            try:
                while not done.is_set():
                    config, tensors, metadata = read_checkpoint(tmp_path)
                    assert tensors["a"].tolist() == [config["r"]] * 3
                    assert metadata["plugin"] == f"toy {config['r']}"
            except BaseException as problem:  # noqa: BLE001 - carried over to the test's thread
                problems.append(problem)

        readers = [threading.Thread(target=read) for _ in range(2)]
        for reader in readers:
            reader.start()
        try:
            for number in range(2, 40):
                save(tmp_path, number)
        finally:
            done.set()
            for reader in readers:
                reader.join()
        assert problems == []
        assert loaded(tmp_path) == 39


class TestStale:
    IDS = ("1" * 32, "2" * 32)

    def leave(self, path, save_id, names=(CONFIG_NAME, WEIGHTS_NAME), age=7200.0):
        save(path, 0)
        then = (path / WEIGHTS_NAME).stat().st_mtime - age
        entries = [path / temporary(name, save_id) for name in names]
        for entry in entries:
            entry.write_text("left over")
            os.utime(entry, (then, then))
        return entries

    @pytest.mark.parametrize("left", [(CONFIG_NAME,), (WEIGHTS_NAME,), (CONFIG_NAME, WEIGHTS_NAME)])
    def test_old_ones_go(self, tmp_path, left):
        self.leave(tmp_path, self.IDS[0], left)
        save(tmp_path, 1)
        assert names(tmp_path) == [CONFIG_NAME, WEIGHTS_NAME]

    def test_those_of_a_running_save_stay(self, tmp_path):
        """Large tensors take time: what counts is the last write to either file."""
        entries = self.leave(tmp_path, self.IDS[0])
        os.utime(entries[0])
        young = self.leave(tmp_path, self.IDS[1], age=1800.0)
        save(tmp_path, 1)
        assert all(entry.exists() for entry in entries + young)

    def test_other_files_stay(self, tmp_path):
        others = ["README.md", f"{CONFIG_NAME}.tmp", f"{CONFIG_NAME}.{'x' * 32}.tmp", f"model.{self.IDS[0]}.tmp"]
        for name in others:
            (tmp_path / name).write_text("mine")
            os.utime(tmp_path / name, (0, 0))
        save(tmp_path, 1)
        assert names(tmp_path) == sorted([CONFIG_NAME, WEIGHTS_NAME, *others])

    def test_a_sleeper_that_wakes_up_keeps_its_config(self, tmp_path, monkeypatch):
        """It passes its first rename just when its tensors are about to be removed."""
        sleeping, _ = self.leave(tmp_path, self.IDS[0])
        unlink = Path.unlink

        def woken(self, **options):
            if self.exists():
                self.replace(tmp_path / "renamed")
            return unlink(self, **options)

        monkeypatch.setattr(Path, "unlink", woken)
        save(tmp_path, 1)
        assert sleeping.exists()

    def test_the_config_of_the_tensors_in_place_stays(self, tmp_path):
        """A sleeper has put its tensors in place after ours, and before anything was looked at."""
        save(tmp_path, 1)
        pending = tmp_path / temporary(CONFIG_NAME, files.saved_id(tmp_path))
        pending.write_text("needed")
        os.utime(pending, (0, 0))
        writing._remove_stale(tmp_path)
        assert pending.exists()
