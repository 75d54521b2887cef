from __future__ import annotations

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from tunerkit.checkpoint import mapping
from tunerkit.checkpoint.encoding import NAMES
from tunerkit.checkpoint.files import WEIGHTS_NAME, read_checkpoint
from tunerkit.checkpoint.mapping import map_tensors

TENSORS = {"b.weight": torch.arange(6.0).reshape(2, 3), "a": torch.ones(4, dtype=torch.bfloat16), "c": torch.tensor(7)}
WHOLE = save(TENSORS, {"format": "pt"})
ITEM = '"dtype":"U8","shape":[1,2],"data_offsets":[0,2]'


def framed(header, data=b""):
    text = header if isinstance(header, bytes) else header.encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.fixture
def path(tmp_path):
    return tmp_path / WEIGHTS_NAME


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("mapped") / WEIGHTS_NAME


def mapped(path, data):
    path.write_bytes(data)
    return map_tensors(path)


def same_as_safetensors(path, data):
    """Map any bytes: there is nothing, or just what safetensors reads."""
    found = mapped(path, data)
    if found is not None:
        theirs = load(data)
        assert list(found.tensors) == sorted(theirs)
        for key, tensor in theirs.items():
            own = found.tensors[key]
            assert (own.dtype, own.shape, own.is_contiguous()) == (tensor.dtype, tensor.shape, True)
            assert own.contiguous().reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))
    return found


def test_tensors_and_the_text_beside_them(path):
    tensors, metadata, header = same_as_safetensors(path, WHOLE)
    assert (metadata, list(tensors)) == ({"format": "pt"}, ["a", "b.weight", "c"])
    assert framed(header) == WHOLE[: 8 + len(header)]
    assert torch.equal(tensors["b.weight"], TENSORS["b.weight"])


def test_the_mapping_is_private_and_outlasts_the_file(path):
    tensors = mapped(path, WHOLE).tensors
    tensors["b.weight"].fill_(9)
    assert path.read_bytes() == WHOLE
    path.unlink()
    assert tensors["b.weight"].eq(9).all()
    assert tensors["c"] == 7


def test_all_are_in_one_storage(path):
    assert len({tensor.untyped_storage().data_ptr() for tensor in mapped(path, WHOLE).tensors.values()}) == 1


@pytest.mark.parametrize("dtype", NAMES, ids=str)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 1, 3)])
def test_every_dtype_and_shape(path, dtype, shape):
    tensors = {"x": torch.ones(shape).to(dtype), "y": torch.ones(4), "z": torch.zeros(shape).to(dtype)}
    assert same_as_safetensors(path, save(tensors)) is not None


def test_no_tensors(path):
    assert same_as_safetensors(path, framed("{}")).tensors == {}


@pytest.mark.parametrize(
    "header",
    [
        "[]",
        f' {{"a":{{{ITEM}}}}}',
        f'\ufeff{{"a":{{{ITEM}}}}}',
        f'{{"a":{{{ITEM}}}}}'.encode("utf-16-le"),
        f'{{"a\\u0061":{{{ITEM}}}}}',
        f'{{"a":{{{ITEM}}},"a":{{{ITEM}}}}}',
        f'{{"a":{{{ITEM},"dtype":"I8"}}}}',
        f'{{"a":{{{ITEM},"more":1}}}}',
        f'{{"a":{{{ITEM}}},"__metadata__":{{"b":1}}}}',
        f'{{"a":{{{ITEM}}},"__metadata__":["b"]}}',
        f'{{"__metadata__":{{}},"a":{{{ITEM}}},"__metadata__":{{}}}}',
        '{"a":{"dtype":"U8","shape":[true,2],"data_offsets":[0,2]}}',
        '{"a":{"dtype":"U8","shape":[1.0,2],"data_offsets":[0,2]}}',
        '{"a":{"dtype":"U8","shape":[-1,-2],"data_offsets":[0,2]}}',
        '{"a":{"dtype":"U8","shape":[3,0],"data_offsets":[0,0]}}',
        '{"a":{"dtype":"U8","shape":[0,9223372036854775808],"data_offsets":[0,0]}}',
        '{"a":{"dtype":"U8","shape":[2],"data_offsets":[0.0,2]}}',
        '{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2.0]}}',
        '{"a":{"dtype":"U8","shape":[2],"data_offsets":[false,2]}}',
        '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        '{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
        '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,2]}}',
        '{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2,4]}}',
        '{"a":{"dtype":["U8"],"shape":[2],"data_offsets":[0,2]}}',
        '{"a":{"dtype":"F4","shape":[4],"data_offsets":[0,2]}}',
        '{"a":["dtype","shape","data_offsets"]}',
        '{"a":' + "[" * 100_000,
        '{"a":' + "9" * 5000,
    ],
)
def test_what_is_left_to_safetensors(path, header):
    """Some of it safetensors reads, some it refuses; Python would take much of it."""
    assert mapped(path, framed(header, b"\1\2")) is None
    assert mapped(path, framed(f'{{"a":{{{ITEM}}}}}', b"\1\2")) is not None


def test_an_empty_file(path):
    assert mapped(path, b"") is None


def test_a_header_larger_than_any(path, monkeypatch):
    monkeypatch.setattr(mapping, "_LARGEST_HEADER", 50)
    assert mapped(path, WHOLE) is None


def test_other_processors_are_left_to_safetensors(path, monkeypatch):
    monkeypatch.setattr("sys.byteorder", "big")
    assert mapped(path, WHOLE) is None


def test_numbers_that_lie_where_their_dtype_cannot_be_read(tmp_path, path):
    header = '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    header += " " * (1 - len(header) % 4)
    data = framed(header, torch.ones(2).numpy().tobytes())
    assert mapped(path, data) is None
    (tmp_path / "adapter_config.json").write_text("{}")
    assert read_checkpoint(tmp_path).tensors["a"].tolist() == [1, 1]


@given(st.dictionaries(st.integers(0, len(WHOLE) - 1), st.integers(1, 255), min_size=1, max_size=4))
@settings(deadline=None)
def test_flipped_bytes(scratch, flips):
    data = bytearray(WHOLE)
    for place, mask in flips.items():
        data[place] ^= mask
    same_as_safetensors(scratch, bytes(data))


NUMBERS = st.integers(-3, 40) | st.integers(0, 2**64) | st.floats() | st.booleans()


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_headers_that_say_something_else(scratch, data):
    size = int.from_bytes(WHOLE[:8], "little")
    header = json.loads(WHOLE[8 : 8 + size])
    item = header[data.draw(st.sampled_from(sorted(header)))]
    part = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))
    item[part] = data.draw(st.lists(NUMBERS, max_size=3) | st.sampled_from(["F32", "U8", "F16", "F8_E8M0", None]))
    same_as_safetensors(scratch, framed(json.dumps(header), WHOLE[8 + size :]))


@given(st.integers(-20, 20))
@settings(deadline=None)
def test_files_of_another_size(scratch, more):
    found = same_as_safetensors(scratch, WHOLE[:more] if more < 0 else WHOLE + bytes(more))
    assert (found is None) == (more != 0)
