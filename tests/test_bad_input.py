"""What users get wrong: each is told what was found, what is possible and what to do, and nothing has changed."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tunerkit import PeftConfig, PeftModel, TunerkitError, get_peft_config, get_peft_model
from tunerkit.errors import (
    AdapterNameError,
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    NoMatchingPeftModuleError,
    UnknownMethodError,
    UnsupportedSiteError,
)
from tunerkit.testing.bench import Snapshot, move
from tunerkit_ia3 import IA3Config
from tunerkit_lora import LoraConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def make_base():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 2))
    base[1].eval()
    base[2].weight.requires_grad_(requires_grad=False)
    return base


def lora(*targets, **others):
    return LoraConfig(target_modules=list(targets or ("0", "2")), r=2, **others)


@pytest.fixture(params=["bare", "adapted"])
def given(request):
    """A model, how an adapter is attached to it, and how one is loaded into it."""
    if request.param == "bare":
        base = make_base()
        return (
            base,
            lambda name, config: get_peft_model(base, config, name),
            lambda f: PeftModel.from_pretrained(base, f, "new"),
        )
    model = get_peft_model(make_base(), IA3Config(target_modules=["0"], feedforward_modules=[]), "old")
    move(model, "old")
    return model, model.add_adapter, lambda folder: model.load_adapter(folder, "new")


@pytest.fixture
def folder(tmp_path):
    model = get_peft_model(make_base(), lora())
    move(model, "default")
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def refusal(model, call, *arguments, error=TunerkitError):
    before = Snapshot.of(model)
    with pytest.raises(error) as caught:
        call(*arguments)
    assert before.differences(model) == []
    return str(caught.value)


def edit(folder, **values):
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    (folder / CONFIG).write_text(json.dumps({**config, **values}), encoding="utf-8")


def edit_tensors(folder, **changes):
    tensors = load_file(folder / WEIGHTS)
    for key, tensor in changes.items():
        name = "base_model.model." + key.replace("_at_", ".") + ".weight"
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, folder / WEIGHTS)


class TestMethods:
    def test_unknown(self, given):
        model, attach, _ = given
        message = refusal(model, attach, "new", PeftConfig(peft_type="LORAA"), error=UnknownMethodError)
        for part in ("'loraa'", "'lora'", "tunerkit-loraa"):
            assert part in message

    def test_missing_plugin_of_a_checkpoint(self, given, folder):
        model, _, load = given
        edit(folder, peft_type="LN_TUNING")
        message = refusal(model, load, folder, error=UnknownMethodError)
        assert "'ln-tuning'" in message
        assert "tunerkit-ln-tuning" in message
        assert "'ia3', 'lora'" in message

    def test_method_that_is_none(self, given, folder):
        model, _, load = given
        edit(folder, peft_type="../evil")
        assert "'../evil' is not a method name: use letters" in refusal(model, load, folder, error=ConfigError)
        edit(folder, peft_type=None)
        assert "The config names no method: its peft_type is None." in refusal(model, load, folder, error=ConfigError)


class TestTargets:
    def test_nothing_matches(self, given):
        model, attach, _ = given
        message = refusal(model, attach, "new", lora("1.00"), error=NoMatchingPeftModuleError)
        assert message.startswith("target_modules=['1.00'] matches nothing in the model. Closest names: '1.0'")

    def test_unsupported_kind(self, given):
        model, attach, _ = given
        message = refusal(model, attach, "new", lora("0", "1"), error=UnsupportedSiteError)
        assert message == (
            "The module '1' is a Sequential, and 'lora' adapts linear layers, embeddings, attention layers "
            "and convolutions (1d, 2d, 3d) only. It contains '1.0': target those."
        )

    def test_nothing_said(self, given):
        model, attach, _ = given
        message = refusal(model, attach, "new", LoraConfig())
        assert "target_modules is not set, and 'lora' has no default for models of the type 'custom'" in message
        assert message.endswith("Set target_modules to names of modules, a pattern, or 'all-linear'.")


class TestSettings:
    @pytest.mark.parametrize(
        ("setting", "value", "words"),
        [
            ("r", "8", "LoraConfig.r must be a whole number; it is '8' of type str."),
            ("r", 0, "LoraConfig.r must be above 0; it is 0."),
            ("lora_dropout", 2, "LoraConfig.lora_dropout must be at most 1; it is 2."),
            (
                "use_qalora",
                True,
                "LoraConfig.use_qalora=True is not supported by this version; only its default, False, is.",
            ),
            ("task_type", "CHAT", "task_type='CHAT' is not a task; possible are 'SEQ_CLS'"),
        ],
    )
    def test_wrong(self, given, folder, setting, value, words):
        with pytest.raises(ConfigError, match="^" + words.replace("(", r"\(")):
            LoraConfig(**{setting: value})
        model, _, load = given
        edit(folder, **{setting: value})
        if setting == "use_qalora":
            words = (
                "LoraConfig.use_qalora=True is not built in this version, so a checkpoint that was made with it cannot "
                "be loaded yet."
            )
        assert refusal(model, load, folder, error=ConfigError).startswith(words)

    def test_unknown_key_that_matters(self, given, folder):
        model, _, load = given
        edit(folder, lora_beta=0.5, new_and_off=False)
        message = refusal(model, load, folder, error=ConfigError)
        assert message.startswith(
            "LoraConfig does not know 'lora_beta' (value 0.5), so the adapter would not be what the file"
        )
        assert "tunerkit-lora" in message
        with pytest.raises(ConfigError, match="does not know 'lora_beta'"):
            get_peft_config({"peft_type": "LORA", "lora_beta": 0.5})


class TestTensors:
    def test_missing(self, given, folder):
        model, _, load = given
        edit_tensors(folder, **{"2_at_lora_B": None})
        message = refusal(model, load, folder, error=CheckpointError)
        assert message.startswith(f"The checkpoint in {str(folder)!r} does not fit the adapter")
        assert "tensors of the adapter that it lacks: 'base_model.model.2.lora_B.weight'" in message
        assert "strict=False" in message

    def test_unexpected(self, given, folder):
        model, _, load = given
        edit_tensors(folder, **{"2_at_lora_C": torch.ones(1)})
        message = refusal(model, load, folder, error=CheckpointError)
        assert "tensors that have no place in the adapter: 'base_model.model.2.lora_C.weight'" in message
        assert message.endswith("Load it into the base model it was made for, or pass strict=False to load what fits.")

    def test_wrong_shape(self, given, folder):
        model, _, load = given
        edit_tensors(folder, **{"2_at_lora_A": torch.ones(2, 5)})
        message = refusal(model, load, folder, error=CheckpointError)
        assert "base_model.model.2.lora_A.weight is (2, 5), the adapter's (2, 4)" in message
        assert message.endswith("Use the config (ranks, targets) and the base model that it was made with.")

    def test_of_another_rank(self, given, folder):
        model, _, load = given
        edit(folder, r=3)
        assert "Tensors whose shapes differ (6)" in refusal(model, load, folder, error=CheckpointError)

    def test_for_another_model(self, given, folder):
        model, _, load = given
        edit(folder, target_modules=["layers.7"])
        assert "target_modules=['layers.7'] matches nothing" in refusal(model, load, folder)


class TestFiles:
    @pytest.mark.parametrize(
        ("data", "words"),
        [
            (b"", "is empty (0 bytes)"),
            (b"{", "is not valid JSON"),
            (b"[]", "holds a JSON value of type list"),
            (b"\xff\xfe", "is not text in UTF-8"),
            (b'{"r": 1, "r": 2}', "holds more than once: 'r'"),
        ],
    )
    def test_broken_config(self, given, folder, data, words):
        model, _, load = given
        (folder / CONFIG).write_bytes(data)
        message = refusal(model, load, folder, error=CheckpointError)
        assert words in message
        assert CONFIG in message

    @pytest.mark.parametrize(
        "damage",
        [
            lambda data: b"",
            lambda data: data[:4],
            lambda data: data[: len(data) // 2],
            lambda data: data[:-1],
            lambda data: struct.pack("<Q", 1 << 40) + data[8:],
            lambda data: b"\xff" + data,
        ],
    )
    def test_broken_or_truncated_tensors(self, given, folder, damage):
        model, _, load = given
        (folder / WEIGHTS).write_bytes(damage((folder / WEIGHTS).read_bytes()))
        message = refusal(model, load, folder, error=CheckpointError)
        assert WEIGHTS in message
        assert "fetch or save the checkpoint again" in message

    @pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
    def test_missing_file(self, given, folder, name):
        model, _, load = given
        (folder / name).unlink()
        message = refusal(model, load, folder, error=CheckpointNotFoundError)
        assert message.startswith(f"There is no {name!r} in '{folder}', which holds:")

    def test_folder_that_is_not_there(self, given, folder):
        model, _, load = given
        message = refusal(model, load, folder.with_name("save"), error=FileNotFoundError)
        assert message == (
            f"There is no folder '{folder.with_name('save')}'. Similar folders in '{folder.parent}': 'saved'. "
            "Check the path."
        )

    def test_file_for_a_folder(self, given, folder):
        model, _, load = given
        message = refusal(model, load, folder / CONFIG, error=CheckpointError)
        assert message == f"'{folder / CONFIG}' is a file; a checkpoint is loaded from its folder: pass '{folder}'."
        adapted = get_peft_model(make_base(), lora())
        message = refusal(adapted, adapted.save_pretrained, folder / CONFIG, error=CheckpointError)
        assert (
            message
            == f"'{folder / CONFIG}' is a file, and a checkpoint is a folder with two files: choose another path."
        )

    @pytest.mark.parametrize("path", ["", None, 3, "a\0b"])
    def test_no_path_at_all(self, given, path):
        model, _, load = given
        assert "folder" in refusal(model, load, path, error=CheckpointError)

    def test_hub_id(self, given):
        model, _, load = given
        message = refusal(model, load, "someone/some-adapter", error=CheckpointNotFoundError)
        assert message.startswith(
            "There is no folder 'someone/some-adapter' here, and 'adapter_config.json' of the repo"
        )
        assert "the hub was not asked, as HF_HUB_OFFLINE is set" in message

    def test_pickles_are_not_read(self, given, folder):
        model, _, load = given
        (folder / WEIGHTS).rename(folder / "adapter_model.bin")
        message = refusal(model, load, folder, error=CheckpointError)
        assert "a pickle, and loading a pickle can run any code" in message
        assert "convert it once" in message


class TestNames:
    def test_taken(self, folder):
        model = get_peft_model(make_base(), lora(), "german")
        message = refusal(model, model.add_adapter, "german", lora(), error=AdapterNameError)
        assert message == (
            "There is an adapter 'german' already (of 'german'). Choose another name, or take it out first with "
            "delete_adapter()."
        )

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("", "An adapter name has 1 to 100 characters; '' has 0."),
            ("x" * 101, "has 101"),
            ("a.b", "The adapter name 'a.b' holds '.'"),
            ("a/b", "holds '/'"),
            ("a\\b", "holds"),
            ("a\nb", "holds '\\n'"),
            ("keys", "'keys' cannot be an adapter name: it is an attribute of the containers that hold adapters"),
            ("training", "'training' cannot be an adapter name"),
            (None, "An adapter name is a string; None is of type NoneType."),
            (["a"], "An adapter name is a string; ['a'] is of type list."),
        ],
    )
    def test_illegal(self, given, folder, name, words):
        model, attach, _ = given
        assert words in refusal(model, attach, name, lora(), error=AdapterNameError)
        if isinstance(model, PeftModel):
            assert words in refusal(model, model.load_adapter, folder, name, error=AdapterNameError)
        else:
            assert words in refusal(model, PeftModel.from_pretrained, model, folder, name, error=AdapterNameError)

    @pytest.mark.parametrize("name", ["weight", "lora_A", "0", "a", "ab", "base_layer", "my adapter", "größe", "model"])
    def test_legal(self, given, folder, name):
        _, attach, _ = given
        model = attach(name, lora()) or given[0]
        assert name in model.peft_config
        assert model.get_base_model()[0].lora_A[name].weight.shape == (2, 3)


def test_saved_tensors_that_do_not_fit_leave_an_adapter_that_is_there(folder):
    model = get_peft_model(make_base(), lora(), "old")
    move(model, "old", seed=3)
    edit_tensors(folder, **{"2_at_lora_A": torch.ones(2, 5)})
    refusal(model, model.load_adapter, folder, "old", error=CheckpointError)
    edit_tensors(folder, **{"2_at_lora_A": None})
    refusal(model, model.load_adapter, folder, "old", error=CheckpointError)
