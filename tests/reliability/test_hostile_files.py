"""Files that are broken, or made to do harm: an error of ours, soon, in little memory, with the model untouched."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import struct
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

from tunerkit import PeftModel, get_peft_model
from tunerkit.checkpoint.files import read_checkpoint, read_tensors
from tunerkit.checkpoint.writing import write_checkpoint
from tunerkit.errors import CheckpointError, ConfigError, TunerkitError
from tunerkit.offline.inspection import inspect_checkpoint
from tunerkit.offline.merging import merge_folder
from tunerkit.offline.tensor_file import TensorFile
from tunerkit.testing.bench import Snapshot, move
from tunerkit_ia3 import IA3Config
from tunerkit_lora import LoraConfig

# What a setting has no effect on, or an entry matches nothing: told, and no harm.
pytestmark = pytest.mark.filterwarnings("ignore::tunerkit.errors.TunerkitWarning")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CORPUS = Path(__file__).parent / "corpus"
MEMORY = 64 << 20
"""Bytes by which the process may grow while it reads a small file, whatever the file says of itself."""


def make_base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 2))


def make_checkpoint(path, config):
    model = get_peft_model(make_base(), config)
    move(model, "default")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("adapter"), LoraConfig(r=1, target_modules=["0", "2"]))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """What a checkpoint holds that is as it should be; not of `folder`, which attacks write to."""
    folder = make_checkpoint(tmp_path_factory.mktemp("good"), LoraConfig(r=1, target_modules=["0", "2"]))
    return (folder / CONFIG).read_bytes(), (folder / WEIGHTS).read_bytes()


@pytest.fixture(scope="module")
def model():
    held = get_peft_model(make_base(), IA3Config(target_modules=["0"], feedforward_modules=[]), "old")
    move(held, "old")
    return held.eval()


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def attack(folder, model, config, weights):
    """Load and inspect; return the message of the refusal of loading, or None. The model is then as it was."""
    (folder / CONFIG).write_bytes(config)
    (folder / WEIGHTS).write_bytes(weights)
    with contextlib.suppress(TunerkitError):
        inspect_checkpoint(folder).to_dict()
    before, size = Snapshot.of(model), peak()
    try:
        model.load_adapter(folder, "new")
    except TunerkitError as error:
        message = str(error)
        assert len(message) < 4000
        message.encode()
    else:
        message = None
        model.delete_adapter("new")
    assert before.differences(model) == []
    assert peak() - size < MEMORY
    return message


def framed(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


class TestTensors:
    @pytest.mark.parametrize("step", [17, pytest.param(1, marks=pytest.mark.long)])
    def test_every_truncation(self, folder, good, model, step):
        for size in range(0, len(good[1]), step):
            message = attack(folder, model, good[0], good[1][:size])
            assert message is not None
            assert WEIGHTS in message

    @pytest.mark.parametrize("step", [17, pytest.param(1, marks=pytest.mark.long)])
    @pytest.mark.parametrize("mask", [0x01, 0x20, 0x80, 0xFF])
    def test_every_byte_of_the_header(self, folder, good, model, mask, step):
        length = int.from_bytes(good[1][:8], "little")
        refused = 0
        for place in range(0, 8 + length, step):
            data = bytearray(good[1])
            data[place] ^= mask
            refused += attack(folder, model, good[0], bytes(data)) is not None
        assert refused > length // step // 4

    @pytest.mark.parametrize("length", [0, 1, 2**31, 2**40, 2**62, 2**63, 2**64 - 1, 99_000_000])
    def test_absurd_header_length(self, folder, good, model, length):
        message = attack(folder, model, good[0], struct.pack("<Q", length) + good[1][8:])
        assert "is not a whole safetensors file" in message

    @pytest.mark.parametrize(
        "offsets", [([0, 8], [4, 12]), ([0, 8], [0, 8]), ([8, 16], [0, 4]), ([0, 2**63], [0, 4]), ([8, 0], [8, 16])]
    )
    def test_offsets_that_overlap_or_lead_out(self, folder, good, model, offsets):
        header = {
            name: {"dtype": "F32", "shape": [2], "data_offsets": list(where)}
            for name, where in zip("ab", offsets, strict=True)
        }
        assert "is not a whole safetensors file" in attack(folder, model, good[0], framed(header, bytes(16)))

    @pytest.mark.parametrize("second", [b'"a"', b'"\\u0061"'])
    def test_a_tensor_that_stands_twice(self, folder, good, model, second):
        """safetensors takes the last and says nothing."""
        one = b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
        two = second + b':{"dtype":"I8","shape":[1],"data_offsets":[0,1]}'
        message = attack(folder, model, good[0], framed(b"{" + one + b"," + two + b"}", b"1"))
        assert message == (
            f"The header of '{folder / WEIGHTS}' holds more than once: 'a'. Which value counts is not clear: keep one "
            "of each."
        )
        with pytest.raises(CheckpointError, match="holds more than once: 'a'"):
            TensorFile.open(folder / WEIGHTS)

    def test_a_tensor_that_is_called_like_a_part_of_the_header(self, tmp_path):
        tensors = {"data_offsets": torch.ones(1), "shape\\": torch.zeros(2)}
        write_checkpoint(tmp_path, {}, tensors, {"shape": "none"})
        assert {key: value.tolist() for key, value in read_tensors(tmp_path).items()} == {
            "data_offsets": [1.0],
            "shape\\": [0.0, 0.0],
        }
        assert TensorFile.open(tmp_path / WEIGHTS).entries.keys() == tensors.keys()

    @pytest.mark.parametrize("shape", [[0, 2**63], [2**64 - 1, 0], [0, 2**40, 2**20], [1] * 100, [0], [2**62], []])
    def test_shapes(self, folder, good, model, shape):
        count = 0 if 0 in shape else 1
        header = {"a": {"dtype": "U8", "shape": shape, "data_offsets": [0, count]}}
        assert attack(folder, model, good[0], framed(header, bytes(count))) is not None

    @pytest.mark.parametrize("shape", [[0, 2**63], [2**64 - 1, 0]])
    def test_a_size_that_torch_cannot_hold(self, folder, shape):
        (folder / WEIGHTS).write_bytes(framed({"a": {"dtype": "U8", "shape": shape, "data_offsets": [0, 0]}}))
        with pytest.raises(CheckpointError, match=r"not a whole safetensors file .*Overflow") as error:
            read_tensors(folder)
        assert "frame #" not in str(error.value)
        with pytest.raises(CheckpointError, match="no tensor is as large as 'a' is said to be"):
            TensorFile.open(folder / WEIGHTS)

    @pytest.mark.parametrize(
        "dtype",
        ["BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F4", "F6_E2M3", "I16", "U32", "U64", "C64", "I1", ""],
    )
    def test_dtypes(self, folder, good, model, dtype):
        """Those of the right size are cast as any tensor is; all others are refused."""
        length = int.from_bytes(good[1][:8], "little")
        header = json.loads(good[1][8 : 8 + length])
        header = {key: item if key == "__metadata__" else {**item, "dtype": dtype} for key, item in header.items()}
        attack(folder, model, good[0], framed(header, good[1][8 + length :]))

    def test_complex_numbers(self, folder, good, model):
        tensors = {key: value.to(torch.complex64) for key, value in read_whole(folder, good).items()}
        message = attack(folder, model, good[0], save(tensors))
        assert "holds complex numbers, and the adapter's are torch.float32: half of each would be lost. Load" in message

    @pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn, torch.float64])
    def test_whole_tensors_of_other_dtypes(self, folder, good, model, dtype):
        tensors = {key: value.to(dtype) for key, value in read_whole(folder, good).items()}
        attack(folder, model, good[0], save(tensors))

    @pytest.mark.parametrize(
        "key", ["../../etc/passwd", "/dev/zero", "a\0b", "", ".", "a" * 100_000, "\u202e", "__init__"]
    )
    def test_names(self, folder, good, model, key):
        message = attack(folder, model, good[0], save({**read_whole(folder, good), key: torch.ones(1)}))
        assert "no place in the adapter: " in message

    @pytest.mark.parametrize("head", [b"PK\x03\x04rest", b"\x80\x02}q\x00X\x01", b"\x80\x04\x95\x10\x00\x00\x00\x00"])
    def test_a_pickle_under_another_name(self, folder, good, model, head):
        message = attack(folder, model, good[0], head + b"rest")
        assert message == (
            f"'{folder / WEIGHTS}' ({len(head) + 4} bytes) is a pickle under another name, and loading a pickle can "
            "run any code, so it is not read. If you trust it, convert it once: load it where it was made and save it "
            "as safetensors."
        )

    def test_the_length_of_a_header_is_no_pickle(self, folder, good, model):
        message = attack(folder, model, good[0], struct.pack("<Q", 0x0280) + b"{}")
        assert "is not a whole safetensors file" in message

    @given(st.data())
    @settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_fuzz(self, folder, good, model, data):
        attack(folder, model, good[0], data.draw(broken_tensors(good[1])))

    @pytest.mark.long
    @given(st.data())
    @settings(deadline=None, max_examples=500, derandomize=False)
    def test_long_fuzz(self, folder, good, model, data):
        attack(folder, model, good[0], data.draw(broken_tensors(good[1])))

    @pytest.mark.parametrize("path", sorted((CORPUS / "tensors").iterdir()), ids=lambda path: path.name)
    def test_corpus(self, folder, good, model, path):
        assert attack(folder, model, good[0], path.read_bytes()) is not None


def read_whole(folder, good):
    (folder / WEIGHTS).write_bytes(good[1])
    return {key: value.clone() for key, value in read_tensors(folder).items()}


@st.composite
def broken_tensors(draw, whole):
    """Whole files with bytes changed, cut out or put in, and headers whose parts are other values."""
    length = int.from_bytes(whole[:8], "little")
    if draw(st.booleans()):
        header = json.loads(whole[8 : 8 + length])
        entry = header[draw(st.sampled_from(sorted(header)))]
        part = draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))
        number = st.integers(0, 2**64) | st.integers(-5, 300)
        entry[part] = draw(st.lists(number, max_size=4) | JSON)
        return framed(header, whole[8 + length :])
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        data[start : start + draw(st.integers(0, 9))] = draw(st.binary(max_size=9))
    return bytes(data)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-3, 9)
    | st.floats()
    | st.text(max_size=9)
    | st.sampled_from(["0", "2", "all-linear", "(", "../x", "LORA", "IA3", "CAUSAL_LM", "lora_only", "gaussian"]),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.sampled_from(["0", "x", "("]), below, max_size=3),
    max_leaves=5,
)
KEYS = sorted({item.name for kind in (LoraConfig, IA3Config) for item in dataclasses.fields(kind)} | {"unknown"})


def nested(depth, start=b"[", end=b"]"):
    return b'{"peft_type": "LORA", "auto_mapping": {"x": ' + start * depth + b"1" + end * depth + b"}}"


VALUES = [
    True, 0, -1, 2**62, 2**63, 2**64, 10**400, -(10**400), 0.5, float("nan"), float("inf"), 1e308, "", "x", "../../etc",
    "a\0b", "(", "\ud800", "x" * 10_000, [], [1], [None], [[]], ["("], [10**400], {}, {"x": 1}, {"(": 1},
    {"0": 10**400},
    {"0": 2**62}, {"0": -1}, {"0": None}, {"0": float("nan")}, {"": {}}, {"x": "x" * 10_000},
]  # fmt: skip


class TestConfig:
    @pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.long)])
    @pytest.mark.parametrize("key", KEYS)
    def test_every_type_in_every_field(self, folder, good, model, key, step):
        values = json.loads(good[0])
        for value in VALUES[KEYS.index(key) % step :: step]:
            attack(folder, model, json.dumps({**values, key: value}).encode(), good[1])

    @pytest.mark.parametrize(
        ("key", "value", "words"),
        [
            (
                "r",
                10**400,
                "LoraConfig.r must be a whole number; it is a number of 1329 bits, of which 63 fit, of type",
            ),
            ("lora_alpha", -(10**400), "it is a number of 1329 bits, of which 63 fit"),
            ("r", 2**62, r"A tensor of shape \(4611686018427387904, 3\) is larger than any memory. Check the sizes in"),
            ("auto_mapping", "x" * 10_000, r"x\.\.\. \(10002 characters\) of type str\."),
            ("target_modules", "", "target_modules='' matches nothing in the model"),
        ],
    )
    def test_messages(self, folder, good, model, key, value, words):
        message = attack(folder, model, json.dumps({**json.loads(good[0]), key: value}).encode(), good[1])
        with pytest.raises(TunerkitError, match=words):
            raise TunerkitError(message)

    def test_feedforward_modules(self):
        with pytest.raises(ConfigError, match=r"feedforward_modules='\(' must be a pattern .*missing \), unterminated"):
            IA3Config(target_modules=["0"], feedforward_modules="(")
        with pytest.raises(ConfigError, match="feedforward_modules must be"):
            IA3Config.from_dict({"target_modules": ["0"], "feedforward_modules": [1]})

    @pytest.mark.parametrize(
        "data",
        [
            nested(49), nested(60), nested(400), nested(990), nested(100_000), nested(300, b'{"a": ', b"}"),
            nested(100_000, b'{"a": ', b"}"), b"null", b"[]", b'"x"', b"1", b"NaN", b"{", b"", b"\xff\xfe{\0}\0",
            b"\xef\xbb\xbf{}", b'{"r": 1, "r": 2}', b'{"auto_mapping": {"a": 1, "a": 2}}', b'{"r": NaN}', b"\0" * 100,
            '{"peft_type": "LORA"}'.encode("utf-16"), b'{"r": 1e999}', b'{"r": ' + b"9" * 5000 + b"}",
            b'{"peft_type": "LORA", "auto_mapping": {"x": "\\ud800"}}', b"{}" + b" " * 100,
        ],
    )  # fmt: skip
    def test_content(self, folder, good, model, data):
        assert attack(folder, model, data, good[1]) is not None

    @pytest.mark.parametrize("depth", [49, 51, 400, 990])
    def test_depth(self, folder, good, model, depth):
        message = attack(folder, model, nested(depth), good[1])
        assert f"'{folder / CONFIG}' ({len(nested(depth))} bytes) is nested too deeply for the config" in message

    def test_length(self, folder, good, model):
        with (folder / CONFIG).open("wb") as file:
            file.truncate(1 << 40)
        try:
            with pytest.raises(CheckpointError, match=r"\(1099511627776 bytes\) is too large for the config of an"):
                model.load_adapter(folder, "new")
        finally:
            (folder / CONFIG).write_bytes(good[0])

    @given(st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1, max_size=4))
    @settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_fuzz(self, folder, good, model, values):
        attack(folder, model, json.dumps({**json.loads(good[0]), **values}).encode(), good[1])

    @pytest.mark.long
    @given(st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1, max_size=4))
    @settings(deadline=None, max_examples=500, derandomize=False)
    def test_long_fuzz(self, folder, good, model, values):
        attack(folder, model, json.dumps({**json.loads(good[0]), **values}).encode(), good[1])

    @pytest.mark.parametrize("path", sorted((CORPUS / "configs").iterdir()), ids=lambda path: path.name)
    def test_corpus(self, folder, good, model, path):
        assert attack(folder, model, path.read_bytes(), good[1]) is not None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
class TestWhatIsNoFile:
    """Each in the place of either file; in a thread, so that reading a pipe for ever would show."""

    @pytest.fixture(params=[CONFIG, WEIGHTS])
    def place(self, request, tmp_path):
        make_checkpoint(tmp_path, LoraConfig(r=1, target_modules=["0", "2"]))
        (tmp_path / request.param).unlink()
        return tmp_path / request.param

    def refused(self, call):
        problems = []

        def run():
            try:
                call()
            except TunerkitError as error:
                problems.append(str(error))

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(10)
        assert not thread.is_alive()
        assert len(problems) == 1
        return problems[0]

    @pytest.mark.parametrize("kind", ["pipe", "folder", "device", "loop", "nowhere"])
    def test_is_refused(self, place, kind):
        makers = {
            "pipe": lambda: os.mkfifo(place),
            "folder": place.mkdir,
            "device": lambda: place.symlink_to("/dev/zero"),
            "loop": lambda: place.symlink_to(place),
            "nowhere": lambda: place.symlink_to("nowhere"),
        }
        makers[kind]()
        calls = [lambda: PeftModel.from_pretrained(make_base(), place.parent), lambda: inspect_checkpoint(place.parent)]
        calls += [lambda: TensorFile.open(place)] if kind != "nowhere" else []
        for call in calls:
            assert place.name in self.refused(call)

    def test_a_save_takes_the_place_of_a_pipe(self, place):
        os.mkfifo(place)
        thread = threading.Thread(
            target=write_checkpoint, args=(place.parent, {"r": 1}, {"a": torch.ones(1)}, {}), daemon=True
        )
        thread.start()
        thread.join(10)
        assert not thread.is_alive()
        assert read_checkpoint(place.parent).config == {"r": 1}

    def test_a_pipe_in_the_place_of_the_card(self, tmp_path):
        os.mkfifo(tmp_path / "README.md")
        with pytest.warns(match=r"README.md' could not be written \(Not a regular file\)"):
            make_checkpoint(tmp_path, LoraConfig(r=1, target_modules=["0"]))

    def test_links_in_a_circle_for_a_merged_folder(self, tmp_path):
        for name in ("base", "adapter"):
            (tmp_path / name).mkdir()
        (tmp_path / "loop").symlink_to("loop")
        with pytest.raises(CheckpointError, match="loop"):
            merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "loop" / "out")
