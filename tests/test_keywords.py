from __future__ import annotations

import shutil
import warnings

import pytest
import torch
from torch import nn

from tunerkit import PeftConfig, PeftModel, check_if_peft_model, get_peft_model, load_peft_weights
from tunerkit.errors import CheckpointError, CheckpointNotFoundError, ConfigError, KeywordError, KeywordWarning
from tunerkit.keywords import HUB_KEYWORDS
from tunerkit.testing.bench import move, same_bits
from tunerkit_lora import LoraConfig

X = torch.linspace(-1, 1, 15).reshape(5, 3)
HUB = {
    "token": "secret",
    "cache_dir": "/nowhere",
    "revision": "main",
    "local_files_only": True,
    "force_download": False,
}


def make_base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


@pytest.fixture
def model():
    model = get_peft_model(make_base(), LoraConfig(target_modules=["0", "2"], r=2, revision="mine"))
    move(model, "default")
    return model.eval()


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def loaders(model, saved):
    return {
        "from_pretrained": lambda **given: PeftModel.from_pretrained(make_base(), saved, **given),
        "load_adapter": lambda **given: model.load_adapter(saved, "default", **given),
        "load_peft_weights": lambda **given: load_peft_weights(saved, **given),
    }


CALLS = ["from_pretrained", "load_adapter", "load_peft_weights"]


@pytest.mark.parametrize("call", CALLS)
class TestLoading:
    def test_what_a_download_takes_says_nothing_of_a_folder(self, model, saved, call):
        loaders(model, saved)[call](**HUB, use_safetensors=True)

    def test_what_belongs_to_the_base_warns(self, model, saved, call):
        load = loaders(model, saved)[call]
        with pytest.warns(KeywordWarning, match=rf"{call}\(torch_dtype=torch.float16\) has no effect, as a checkpoint"):
            load(torch_dtype=torch.float16)
        with pytest.warns(
            KeywordWarning, match=rf"{call}\(device_map='auto'\) has no effect, as the adapter goes where"
        ):
            load(device_map="auto")
        load(device_map=None, offload_folder=None)

    def test_pickles_are_refused(self, model, saved, call):
        with pytest.raises(
            KeywordError, match=rf"{call}\(use_safetensors=False\) asks for a pickle, which can run code"
        ):
            loaders(model, saved)[call](use_safetensors=False)

    def test_the_unknown_is_refused(self, model, saved, call):
        for error in (KeywordError, ConfigError, TypeError, ValueError):
            with pytest.raises(
                error, match=rf"{call} has no keyword argument 'key_maping', 'x'. Closest to 'key_maping'"
            ):
                loaders(model, saved)[call](key_maping={}, x=1)
        with pytest.raises(KeywordError, match=rf"{call} has no keyword argument 'zzz'. Leave it out."):
            loaders(model, saved)[call](zzz=1)


class TestSaving:
    def test_what_peft_takes_and_does_not_read(self, model, tmp_path):
        model.save_pretrained(tmp_path, save_function=torch.save, max_shard_size="1GB", push_to_hub=False, token="x")
        assert check_if_peft_model(tmp_path)

    def test_refusals(self, model, tmp_path):
        with pytest.raises(
            KeywordError, match=r"no keyword argument 'selected_adapter'. Closest .* 'selected_adapters'"
        ):
            model.save_pretrained(tmp_path / "new", selected_adapter=["default"])
        assert not (tmp_path / "new").exists()


class TestConfig:
    def test_hub_keywords_are_no_settings(self, saved):
        peft = pytest.importorskip("peft", reason="comparing with PEFT needs it")
        mine = PeftConfig.from_pretrained(saved, **HUB)
        assert mine.revision == peft.PeftConfig.from_pretrained(saved, **HUB).revision == "mine"

    def test_keywords_are_those_of_a_download(self):
        hub = pytest.importorskip("huggingface_hub")
        import inspect

        own = set(inspect.signature(hub.hf_hub_download).parameters) - {"repo_id", "filename", "subfolder"}
        asked = {
            "cache_dir",
            "endpoint",
            "force_download",
            "headers",
            "local_dir",
            "local_files_only",
            "revision",
            "token",
        }
        assert asked <= own & HUB_KEYWORDS

    def test_json_file(self, saved):
        peft = pytest.importorskip("peft", reason="comparing with PEFT needs it")
        path = saved / "adapter_config.json"
        assert PeftConfig.from_json_file(path) == peft.PeftConfig.from_json_file(path)
        path.rename(saved / "other.json")
        assert PeftConfig.from_json_file(str(saved / "other.json"))["peft_type"] == "LORA"
        with pytest.raises(CheckpointNotFoundError, match=r"There is no file '.*adapter_config.json'. Check the path."):
            PeftConfig.from_json_file(path)
        with pytest.raises(CheckpointError, match="cannot be read"):
            PeftConfig.from_json_file(saved)

    def test_check_if_peft_model(self, saved, tmp_path):
        assert check_if_peft_model(saved) is True
        assert check_if_peft_model(str(tmp_path)) is False
        assert check_if_peft_model(tmp_path / "nothing") is False
        config = saved / "adapter_config.json"
        config.write_text(config.read_text(encoding="utf-8").replace('"LORA"', '"NEVER_HEARD"'), encoding="utf-8")
        assert check_if_peft_model(saved) is False


class Renamed(nn.Module):
    """A model whose modules had other names when its checkpoints were made."""

    _checkpoint_conversion_mapping = {"^old": "new"}  # noqa: RUF012 - as transformers has it

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.new = nn.Linear(3, 3)

    def forward(self, x):
        return self.new(x)


def test_mapping_of_the_model_is_used(tmp_path):
    """As in PEFT: the model says how names have changed, unless the caller does."""
    peft = pytest.importorskip("peft", reason="comparing with PEFT needs it")
    before = nn.ModuleDict({"old": nn.Linear(3, 3)})
    torch.manual_seed(1)
    source = get_peft_model(before, LoraConfig(target_modules=["old"], init_lora_weights=False, r=2))
    source.peft_config["default"].target_modules = {"new"}
    source.save_pretrained(tmp_path)
    mine, theirs = (place.PeftModel.from_pretrained(Renamed(), tmp_path) for place in (__import__("tunerkit"), peft))
    with torch.no_grad():
        torch.testing.assert_close(mine(X), theirs(X))
        assert (mine(X) - Renamed()(X)).abs().max() > 1e-3
    with pytest.raises(CheckpointError, match="does not fit"):
        PeftModel.from_pretrained(Renamed(), tmp_path, key_mapping={})


class TestAgainstPeft:
    """What the keyword arguments of loading do, on both libraries."""

    @pytest.mark.parametrize(
        "given",
        [
            {},
            {"is_trainable": True},
            {"low_cpu_mem_usage": True},
            {"torch_device": "cpu"},
            {"autocast_adapter_dtype": False},
            {"key_mapping": {r"^other\.": ""}},
            {"subfolder": "sub"},
            {"is_trainable": True, "low_cpu_mem_usage": True, "subfolder": "sub"},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("how", ["from_pretrained", "load_adapter"])
    def test_same_state(self, saved, given, how):
        peft = pytest.importorskip("peft", reason="comparing with PEFT needs it")
        shutil.copytree(saved, saved / "sub")
        found = []
        for library, config in ((__import__("tunerkit"), LoraConfig), (peft, peft.LoraConfig)):
            base = make_base().bfloat16()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if how == "from_pretrained":
                    model = library.PeftModel.from_pretrained(base, saved, **given)
                    name = "default"
                else:
                    model = library.get_peft_model(base, config(target_modules=["2"], r=3))
                    name = "b"
                    model.load_adapter(saved, name, **given)
                    # Which adapter trains now is one of the differences that are documented.
            own = {key: value for key, value in model.named_parameters() if name in key.split(".")}
            flags = [value.requires_grad for value in own.values()] if how == "from_pretrained" else []
            found.append(({key: value.detach() for key, value in own.items()}, flags, model.training))
        mine, theirs = found
        assert mine[1:] == theirs[1:]
        assert mine[0].keys() == theirs[0].keys() != set()
        for key, value in mine[0].items():
            assert value.dtype == theirs[0][key].dtype
            if "low_cpu_mem_usage" in given:  # PEFT rounds the tensors to the base's dtype on their way
                assert same_bits(value.bfloat16().float(), theirs[0][key])
                assert not same_bits(value, theirs[0][key])
            else:
                assert same_bits(value, theirs[0][key])
