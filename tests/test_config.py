from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import pickle
import types
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunerkit import Method, PeftConfig, PeftType, TaskType, get_peft_config, plugins, register
from tunerkit.adapter import Adapter
from tunerkit.config import PEFT_FORMAT_VERSION, built_settings, check_config, config_class, setting, unbuilt
from tunerkit.errors import CheckpointError, CheckpointNotFoundError, ConfigError, UnknownMethodError
from tunerkit_ia3 import IA3Config
from tunerkit_lora import LoraConfig


@dataclass
class ToyConfig(PeftConfig):
    peft_type: str | None = "CONFIG_TOY"
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    rank: int = setting(4, minimum=1, maximum=64)
    dropout: float = setting(0.0, minimum=0, maximum=1)
    power: float = setting(1.0, above=0)
    names: dict[str, int] = setting(factory=dict)
    scratch: str = setting("here", saved=False)
    mode: Literal["fast", "exact"] = "fast"
    layers: list[int] | int | None = unbuilt(None)
    groups: dict[str, int] | None = unbuilt(factory=dict)
    cores: int = unbuilt(2)


class ToyAdapter(Adapter):
    pass


@pytest.fixture
def toy():
    register("config-toy", types.SimpleNamespace(method=Method(config=ToyConfig, adapter=ToyAdapter)))
    yield ToyConfig
    plugins.unregister("config-toy")


def refused(**values):
    with pytest.raises(ConfigError) as caught:
        ToyConfig(**values)
    assert isinstance(caught.value, ValueError)
    return str(caught.value)


class TestChecks:
    def test_defaults(self):
        config = ToyConfig()
        assert config.peft_type == "CONFIG_TOY"
        assert config.peft_version == PEFT_FORMAT_VERSION
        assert config.task_type is None
        assert not config.inference_mode
        assert not config.is_prompt_learning
        assert not config.is_adaption_prompt

    def test_wrong_type(self):
        assert refused(rank="8") == "ToyConfig.rank must be a whole number; it is '8' of type str."
        assert refused(rank=True) == "ToyConfig.rank must be a whole number; it is True of type bool."
        assert refused(dropout=math.nan) == "ToyConfig.dropout must be a finite number; it is nan of type float."
        assert refused(target_modules=3).startswith(
            "ToyConfig.target_modules must be a list of text or text or None; it"
        )
        assert refused(mode="slow") == "ToyConfig.mode must be 'fast' or 'exact'; it is 'slow' of type str."
        assert refused(names={"a": "b"}) == (
            "ToyConfig.names must be a dict of text to a whole number; it is {'a': 'b'} of type dict."
        )
        assert "ToyConfig.inference_mode must be True or False; it is None" in refused(inference_mode=None)
        assert "ToyConfig.peft_type must be" in refused_type()

    def test_again_when_asked(self):
        config = ToyConfig()
        config.rank = 65
        with pytest.raises(ConfigError, match=r"^ToyConfig.rank must be at most 64; it is 65\."):
            config.check()
        config.rank, config.target_modules, config.task_type = 8, ["a"], "CAUSAL_LM"
        config.check()
        assert (config.target_modules, config.task_type) == ({"a"}, TaskType.CAUSAL_LM)

    def test_what_is_built(self):
        assert built_settings(ToyConfig) == [
            *("target_modules", "exclude_modules", "rank", "dropout", "power", "names", "scratch", "mode")
        ]

    def test_out_of_range(self):
        assert refused(rank=0) == "ToyConfig.rank must be at least 1; it is 0."
        assert refused(rank=65) == "ToyConfig.rank must be at most 64; it is 65."
        assert refused(power=0) == "ToyConfig.power must be above 0; it is 0."
        assert refused(dropout=-0.5) == "ToyConfig.dropout must be at least 0; it is -0.5."
        assert refused(dropout=1.5) == "ToyConfig.dropout must be at most 1; it is 1.5."

    @given(st.integers(), st.floats(allow_nan=False, allow_infinity=False))
    def test_ranges_hold_their_ends(self, rank, dropout):
        right = 1 <= rank <= 64 and 0 <= dropout <= 1
        if right:
            assert ToyConfig(rank=rank, dropout=dropout).rank == rank
        else:
            refused(rank=rank, dropout=dropout)

    def test_not_built(self):
        assert refused(layers=0) == (
            "ToyConfig.layers=0 is not supported by this version; only its default, None, is. Leave it out, or use the "
            "method without that feature."
        )
        assert "ToyConfig.groups={'a': 1} is not supported" in refused(groups={"a": 1})
        assert "ToyConfig.cores=3 is not supported by this version; only its default, 2, is." in refused(cores=3)
        assert "ToyConfig.cores=0" in refused(cores=0)

    @pytest.mark.parametrize("empty", [None, []])
    def test_what_says_nothing_may_be_given_though_not_built(self, empty):
        assert ToyConfig(layers=empty).layers == empty
        assert ToyConfig(groups=None).groups is None

    def test_another_methods_type(self):
        message = refused(peft_type="OTHER")
        assert message == "ToyConfig is the config of CONFIG_TOY; its peft_type cannot be 'OTHER'."

    def test_tasks(self):
        assert ToyConfig(task_type="CAUSAL_LM").task_type is TaskType.CAUSAL_LM
        assert ToyConfig(task_type=TaskType.SEQ_CLS).task_type == "SEQ_CLS"
        message = refused(task_type="CAUSAL")
        assert message.startswith(
            "task_type='CAUSAL' is not a task; possible are 'SEQ_CLS', 'SEQ_2_SEQ_LM', 'CAUSAL_LM'"
        )
        assert str(TaskType.SEQ_CLS) == "SEQ_CLS"

    def test_lists_of_modules_are_sets(self):
        config = ToyConfig(target_modules=["a", "b", "a"], exclude_modules=("c",))
        assert config.target_modules == {"a", "b"}
        assert config.exclude_modules == {"c"}
        assert ToyConfig(target_modules=".*").target_modules == ".*"


def refused_type():
    with pytest.raises(ConfigError) as caught:
        PeftConfig(peft_type=5)
    return str(caught.value).replace("PeftConfig", "ToyConfig")


class TestTypes:
    def test_is_text_with_a_value(self):
        kind = PeftType.LORA
        assert isinstance(kind, str)
        assert kind == kind.value == kind.name == str(kind) == "LORA"
        assert repr(kind) == "<PeftType.LORA>"
        assert pickle.loads(pickle.dumps(kind)) == kind  # noqa: S301 - our own bytes
        assert json.dumps({"type": kind}) == '{"type": "LORA"}'

    def test_is_found_among_what_is_installed(self, toy):
        assert {"LORA", "IA3", "CONFIG_TOY"} <= set(PeftType)
        assert {"LORA", "CONFIG_TOY"} <= set(dir(PeftType))
        assert toy().peft_type == PeftType.CONFIG_TOY
        assert LoraConfig().peft_type is not None
        assert isinstance(LoraConfig().peft_type, PeftType)

    def test_unknown(self):
        with pytest.raises(
            AttributeError, match="No installed package offers a method of the type 'LORRA'; installed are"
        ):
            PeftType.LORRA  # noqa: B018 - the look-up is what fails
        assert not hasattr(PeftType, "_LORA")


class TestDicts:
    def test_to_dict_holds_what_belongs_into_a_checkpoint(self):
        config = ToyConfig(target_modules=["a"], names={"a": 1}, scratch="there")
        values = config.to_dict()
        assert "scratch" not in values
        assert values["target_modules"] == {"a"}
        assert set(values) == {item.name for item in dataclasses.fields(ToyConfig)} - {"scratch"}
        values["names"]["b"] = 2
        values["target_modules"].add("b")
        assert (config.names, config.target_modules) == ({"a": 1}, {"a"})

    def test_copy_is_independent(self):
        config = ToyConfig(target_modules=["a"], names={"a": 1})
        other = config.copy()
        assert other == config
        other.target_modules.add("b")
        other.names["b"] = 2
        assert (config.names, config.target_modules) == ({"a": 1}, {"a"})

    @pytest.mark.parametrize("empty", [None, False, 0, 0.0, "", [], {}])
    def test_unknown_key_that_says_nothing_is_ignored(self, empty):
        assert ToyConfig.from_dict({"rank": 2, "new_feature": empty}) == ToyConfig(rank=2)

    @pytest.mark.parametrize("value", [True, 1, 0.5, "x", [0], {"a": None}])
    def test_unknown_key_that_matters_is_refused(self, value):
        with pytest.raises(ConfigError) as caught:
            ToyConfig.from_dict({"ranks": value, "peft_type": "CONFIG_TOY"})
        message = str(caught.value)
        assert message.startswith(
            f"ToyConfig does not know 'ranks' (value {value!r}), so the adapter would not be what the"
        )
        assert "Closest to 'ranks': 'rank'" in message
        assert message.endswith("Upgrade the package, or remove the key if it does not matter.")
        assert ToyConfig.__module__ in message

    def test_setting_of_a_file_that_is_not_built(self):
        with pytest.raises(ConfigError) as caught:
            ToyConfig.from_dict({"rank": 2, "layers": [0], "peft_type": "CONFIG_TOY"})
        assert str(caught.value) == (
            "ToyConfig.layers=[0] is not built in this version, so a checkpoint that was made with it cannot be loaded "
            "yet."
        )

    def test_unknown_key_that_resembles_a_setting_a_little(self):
        with pytest.raises(ConfigError) as caught:
            ToyConfig.from_dict({"power_rank": 2})
        assert "Closest" not in str(caught.value)

    def test_unknown_key_names_package_and_version(self):
        with pytest.raises(ConfigError, match=r"The config class comes from tunerkit-lora \d+\.\d+") as caught:
            LoraConfig.from_dict({"zzzzzz": 1})
        assert "Closest" not in str(caught.value)

    def test_unsaved_settings_of_a_file_are_ignored(self):
        assert ToyConfig.from_dict({"scratch": "elsewhere"}).scratch == "here"

    def test_get_peft_config(self, toy):
        config = get_peft_config({"peft_type": "CONFIG_TOY", "rank": 2})
        assert type(config) is toy
        assert config.rank == 2
        assert config_class("CONFIG_TOY") is toy
        assert type(toy.from_peft_type(rank=3)) is toy

    @pytest.mark.parametrize("values", [{}, {"peft_type": None}, {"peft_type": 3}, {"peft_type": ["LORA"]}])
    def test_no_method(self, values):
        with pytest.raises(ConfigError, match=r"The config names no method: its peft_type is .* as text"):
            get_peft_config(values)

    def test_unknown_method_names_the_package_to_install(self):
        with pytest.raises(UnknownMethodError, match="tunerkit-no-such") as caught:
            get_peft_config({"peft_type": "NO_SUCH"})
        assert isinstance(caught.value, KeyError)
        assert isinstance(caught.value, ValueError)

    def test_no_key_gets_in_the_way(self):
        with pytest.raises(ConfigError, match="does not know 'cls', 'self', 'values'"):
            get_peft_config({"peft_type": "LORA", "cls": 1, "self": 2, "values": 3})


class TestFiles:
    def test_round_trip(self, toy, tmp_path):
        settings = {"task_type": "SEQ_CLS", "auto_mapping": {"base_model_class": "X"}, "revision": "main"}
        config = toy(target_modules=["b", "a"], rank=7, names={"x": 1}, dropout=0.25, **settings)
        config.save_pretrained(tmp_path / "new" / "folder")
        assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["adapter_config.json"]
        written = json.loads((tmp_path / "new" / "folder" / "adapter_config.json").read_text(encoding="utf-8"))
        assert written["target_modules"] == ["a", "b"]
        assert written["peft_type"] == "CONFIG_TOY"
        assert written["peft_version"] == PEFT_FORMAT_VERSION
        assert "scratch" not in written
        assert PeftConfig.from_pretrained(tmp_path / "new" / "folder") == config
        assert PeftConfig.from_pretrained(tmp_path, subfolder="new/folder") == config
        assert PeftConfig.from_pretrained(str(tmp_path), "new/folder") == config

    def test_class_is_that_of_the_file(self, toy, tmp_path):
        toy(rank=2).save_pretrained(tmp_path)
        assert type(LoraConfig.from_pretrained(tmp_path)) is toy

    def test_values_of_the_file_win(self, toy, tmp_path):
        (tmp_path / "adapter_config.json").write_text('{"peft_type": "CONFIG_TOY", "rank": 2}', encoding="utf-8")
        config = PeftConfig.from_pretrained(tmp_path, rank=9, power=2.0)
        assert (config.rank, config.power) == (2, 2.0)

    def test_saving_over_an_old_one(self, toy, tmp_path):
        toy(rank=2).save_pretrained(tmp_path)
        toy(rank=3).save_pretrained(tmp_path)
        assert PeftConfig.from_pretrained(tmp_path).rank == 3

    def test_nowhere_to_read(self, tmp_path):
        with pytest.raises(CheckpointNotFoundError, match=r"There is no folder .*missing"):
            PeftConfig.from_pretrained(tmp_path / "missing")
        with pytest.raises(CheckpointNotFoundError, match=r"There is no 'adapter_config.json' in"):
            PeftConfig.from_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match="A checkpoint's folder is a path"):
            PeftConfig.from_pretrained(None)
        with pytest.raises(CheckpointNotFoundError, match=r"is not in the cache .* as HF_HUB_OFFLINE is set"):
            PeftConfig.from_pretrained("someone/some-adapter")

    def test_nowhere_to_write(self, toy, tmp_path):
        (tmp_path / "file").write_text("", encoding="utf-8")
        with pytest.raises(CheckpointError, match="is a file, and a checkpoint is a folder"):
            toy().save_pretrained(tmp_path / "file")

    def test_a_disk_that_refuses(self, toy, tmp_path, monkeypatch):
        def fail(file):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        toy(rank=2).save_pretrained(tmp_path)
        monkeypatch.setattr(os, "fsync", fail)
        message = r"could not be written to .*No space left on device.*What was there before is unchanged: free some"
        with pytest.raises(CheckpointError, match=message):
            toy(rank=3).save_pretrained(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]
        assert PeftConfig.from_pretrained(tmp_path).rank == 2

    def test_setting_that_json_cannot_hold(self, tmp_path):
        config = PeftConfig(auto_mapping={"a": object()})
        with pytest.raises(CheckpointError, match="The value of 'auto_mapping' cannot be saved as JSON"):
            config.save_pretrained(tmp_path / "new")
        assert not (tmp_path / "new").exists()

    def test_wrong_value_in_a_file(self, toy, tmp_path):
        (tmp_path / "adapter_config.json").write_text('{"peft_type": "CONFIG_TOY", "rank": "many"}', encoding="utf-8")
        with pytest.raises(ConfigError, match=r"ToyConfig.rank must be a whole number; it is 'many'"):
            PeftConfig.from_pretrained(tmp_path)


@dataclass
class OwnSetsConfig(PeftConfig):
    heads: Any = None

    _sets: ClassVar[tuple[str, ...]] = ("heads",)


def test_a_method_says_which_lists_are_sets():
    assert OwnSetsConfig(heads=frozenset("ab")).heads == {"a", "b"}


@pytest.mark.parametrize(("mine", "name"), [(LoraConfig, "LoraConfig"), (IA3Config, "IA3Config")])
def test_keys_are_those_of_peft(mine, name):
    peft = pytest.importorskip("peft", reason="comparing with PEFT needs it")
    theirs = getattr(peft, name)(target_modules=["a"]).to_dict()
    theirs.pop("runtime_config", None)
    assert set(mine(target_modules=["a"]).to_dict()) == set(theirs)


class TestCheckConfig:
    @pytest.mark.parametrize(
        ("config", "words"),
        [
            (ToyConfig, "peft_config is the class ToyConfig itself: make a config of it, ToyConfig(...)."),
            (
                {"r": 8},
                (
                    "peft_config must be the config of a method, a PeftConfig; it is a dict. Make one of the dict with "
                    "get_peft_config(...)."
                ),
            ),
            ("LORA", "peft_config must be the config of a method, a PeftConfig; it is a str."),
            (None, "peft_config must be the config of a method, a PeftConfig; it is a NoneType."),
        ],
    )
    def test_something_else(self, config, words):
        with pytest.raises(ConfigError) as caught:
            check_config(config)
        assert str(caught.value) == words

    def test_pefts_own(self):
        peft = pytest.importorskip("peft", reason="asks for PEFT's own config: pip install peft")
        for config in (peft.LoraConfig(), peft.LoraConfig):
            with pytest.raises(ConfigError) as caught:
                check_config(config)
            assert str(caught.value) == (
                "peft_config is PEFT's LoraConfig (from peft.tuners.lora.config). Import the class of that name from "
                "the method's package, `from tunerkit_<method> import ...`; installed methods: "
                + ", ".join(map(repr, plugins.method_ids()))
                + "."
            )


@dataclass
class Layered(PeftConfig):
    peft_type: str | None = "LAYERED"
    target_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None


class TestLayers:
    @pytest.mark.parametrize(
        "settings",
        [
            {"layers_to_transform": 0, "target_modules": ["q"]},
            {"layers_to_transform": [0, 1], "layers_pattern": "layers"},
            {"layers_to_transform": [], "layers_pattern": ["layers"], "target_modules": ["q"]},
            {"layers_pattern": "", "target_modules": ["q"]},
            {"target_modules": "all-linear"},
        ],
    )
    def test_is_taken(self, settings):
        assert Layered(**settings).layers_to_transform == settings.get("layers_to_transform")

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (
                {"layers_to_transform": 0, "target_modules": ".*q"},
                (
                    "Layered.layers_to_transform=0 narrows a list of names in target_modules, which is the text '.*q'. "
                    "Pass a list, or say in the pattern which layers are meant."
                ),
            ),
            (
                {"layers_to_transform": [], "target_modules": "all-linear"},
                (
                    "Layered.layers_to_transform=[] narrows a list of names in target_modules, which is the text "
                    "'all-linear'. Pass a list, or say in the pattern which layers are meant."
                ),
            ),
            (
                {"layers_pattern": "", "target_modules": "q"},
                (
                    "Layered.layers_pattern='' narrows a list of names in target_modules, which is the text 'q'. "
                    "Pass a list, or say in the pattern which layers are meant."
                ),
            ),
            (
                {"layers_pattern": ["h"], "target_modules": ["q"]},
                (
                    "Layered.layers_pattern=['h'] is the name before a layer's number and does nothing without "
                    "layers_to_transform. Set that too, or leave both out."
                ),
            ),
        ],
    )
    def test_is_refused_as_in_peft(self, settings, message):
        peft = pytest.importorskip("peft", reason="comparing with PEFT needs it")
        with pytest.raises(ValueError, match="layers_"):
            peft.LoraConfig(**settings)
        with pytest.raises(ConfigError) as caught:
            Layered(**settings)
        assert str(caught.value) == message
