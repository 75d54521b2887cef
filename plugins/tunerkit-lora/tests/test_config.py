import dataclasses
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tunerkit import PeftConfig
from tunerkit.config import built_settings
from tunerkit.errors import ConfigError
from tunerkit.sites import LinearSite
from tunerkit_lora.adapter import LoraAdapter
from tunerkit_lora.config import LoraConfig, LoraRuntimeConfig
from tunerkit_lora.targets import DEFAULT_TARGETS

NO_PEFT = "comparing with PEFT needs it: pip install peft"

# Per field that is not built: a value away from its default.
UNBUILT = {
    "lora_ga_config": {"scale": "stable"},
    "megatron_config": {"hidden": 1},
    "megatron_core": "other.core",
    "trainable_token_indices": [0],
    "velora_config": {"scale": 1.0},
    "alora_invocation_tokens": [3],
    "use_qalora": True,
    "qalora_group_size": 8,
    "monteclora_config": {"num_samples": 4},
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 2},
    "kasa_config": {"beta": 0.1},
}
BUILT = {
    "r": 4,
    "target_modules": ["q", "v"],
    "exclude_modules": "head.*",
    "target_parameters": ["head.weight"],
    "modules_to_save": ["head"],
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "use_rslora": True,
    "bias": "lora_only",
    "layer_replication": [[0, 2], [1, 3]],
    "layers_to_transform": [0, 2],
    "layers_pattern": "layers",
    "init_lora_weights": False,
    "fan_in_fan_out": True,
    "rank_pattern": {"head": 2},
    "alpha_pattern": {"head": 2.5},
    "lora_bias": True,
    "ensure_weight_tying": True,
    "task_type": "CAUSAL_LM",
    "revision": "main",
}


def test_the_readme_lists_what_is_built():
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert [name for name in built_settings(LoraConfig) if f"`{name}`" not in text] == []


def own_fields():
    common = {item.name for item in dataclasses.fields(PeftConfig)}
    return {item.name for item in dataclasses.fields(LoraConfig)} - common


# What belongs to single starts, or does not go with the others: their own tests are in test_inits.py and test_dora.py.
APART = {"loftq_config", "eva_config", "corda_config", "use_dora", "runtime_config"}


def test_every_field_is_either_built_or_refused():
    assert own_fields() == {*UNBUILT, *APART} | ({*BUILT} - {"task_type", "revision"})


@pytest.mark.parametrize("name", UNBUILT)
def test_a_field_that_is_not_built_is_refused_by_name(name):
    default = getattr(LoraConfig(), name)
    with pytest.raises(ConfigError) as error:
        LoraConfig(**{name: UNBUILT[name]})
    assert str(error.value) == (
        f"LoraConfig.{name}={UNBUILT[name]!r} is not supported by this version; only its default, {default!r}, is. "
        "Leave it out, or use the method without that feature."
    )


@pytest.mark.parametrize("name", UNBUILT)
def test_the_default_of_a_field_that_is_not_built_can_be_given(name):
    default = getattr(LoraConfig(), name)
    assert getattr(LoraConfig(**{name: default}), name) == default


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 0}, "LoraConfig.r must be above 0; it is 0."),
        ({"r": 2.5}, "LoraConfig.r must be a whole number; it is 2.5 of type float."),
        ({"r": True}, "LoraConfig.r must be a whole number; it is True of type bool."),
        ({"lora_alpha": "8"}, "LoraConfig.lora_alpha must be a finite number; it is '8' of type str."),
        ({"lora_dropout": -0.1}, "LoraConfig.lora_dropout must be at least 0; it is -0.1."),
        ({"lora_dropout": 1.5}, "LoraConfig.lora_dropout must be at most 1; it is 1.5."),
        ({"lora_dropout": math.nan}, "LoraConfig.lora_dropout must be a finite number; it is nan of type float."),
        ({"use_rslora": 1}, "LoraConfig.use_rslora must be True or False; it is 1 of type int."),
        (
            {"target_modules": [1]},
            "LoraConfig.target_modules must be a list of text or text or None; it is [1] of type list.",
        ),
        (
            {"bias": "some"},
            "LoraConfig.bias must be 'none' or 'all' or 'lora_only'; it is 'some' of type str.",
        ),
        (
            {"rank_pattern": {"q": 4, "v": 0}},
            "LoraConfig.rank_pattern['v'] must be above 0; it is 0.",
        ),
        (
            {"rank_pattern": {"q": 2.5}},
            (
                "LoraConfig.rank_pattern must be a dict of text to a whole number or None; it is {'q': 2.5} of type "
                "dict."
            ),
        ),
        (
            {"alpha_pattern": ["q"]},
            "LoraConfig.alpha_pattern must be a dict of text to a finite number or None; it is ['q'] of type list.",
        ),
        ({"lora_bias": "yes"}, "LoraConfig.lora_bias must be True or False; it is 'yes' of type str."),
        (
            {"lora_bias": True, "init_lora_weights": "gaussian"},
            (
                "LoraConfig.lora_bias=True needs init_lora_weights=True or False; it is 'gaussian'. Leave one of the "
                "two out."
            ),
        ),
        ({"fan_in_fan_out": None}, "LoraConfig.fan_in_fan_out must be True or False; it is None of type NoneType."),
        (
            {"runtime_config": {"ephemeral_gpu_offload": True}},
            (
                "LoraConfig.runtime_config must be a LoraRuntimeConfig; it is {'ephemeral_gpu_offload': True} of type "
                "dict."
            ),
        ),
        ({"peft_type": "OTHER"}, "LoraConfig is the config of LORA; its peft_type cannot be 'OTHER'."),
    ],
)
def test_a_wrong_setting_is_named(values, message):
    with pytest.raises(ConfigError) as error:
        LoraConfig(**values)
    assert str(error.value) == message


def test_an_unknown_setting_is_refused():
    with pytest.raises(TypeError, match="lora_alfa"):
        LoraConfig(lora_alfa=8)


@pytest.mark.parametrize(
    ("settings", "scaling"),
    [
        ({}, 1.0),
        ({"r": 4, "lora_alpha": 16}, 4.0),
        ({"r": 4, "lora_alpha": 16, "use_rslora": True}, 8.0),
        ({"r": 4, "lora_alpha": 1.5}, 0.375),
        ({"lora_alpha": 0}, 0.0),
    ],
)
def test_scaling(settings, scaling):
    assert LoraAdapter(LinearSite(nn.Linear(8, 8)), LoraConfig(**settings)).scaling == pytest.approx(scaling)


@pytest.mark.parametrize(
    ("name", "rank", "alpha", "scaling"),
    [
        ("layers.0.q", 2, 16, 8.0),
        ("layers.0.seq", 8, 16, 2.0),
        ("q", 2, 16, 8.0),
        ("layers.1.v", 4, 3, 0.75),
        ("layers.10.v", 8, 3, 0.375),
        ("outer.layers.1.v", 8, 3, 0.375),
        ("head", 8, 16, 2.0),
    ],
)
def test_patterns_of_ranks_and_scales(name, rank, alpha, scaling):
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        rank_pattern={"q": 2, r"^layers\.1\.(q|v)": 4, "layers.0.q": 6},
        alpha_pattern={"[kv]": 3},
    )
    assert (config.rank_for(name), config.alpha_for(name)) == (rank, alpha)
    adapter = LoraAdapter(LinearSite(nn.Linear(8, 8), name), config)
    assert (adapter.r, adapter.lora_alpha, adapter.scaling) == (rank, alpha, scaling)


def test_no_patterns():
    config = LoraConfig(rank_pattern=None, alpha_pattern=None)
    assert (config.rank_for("q"), config.alpha_for("q")) == (8, 8)


paths = st.lists(st.sampled_from(["q", "seq", "layers", "0", "10", "v"]), min_size=1, max_size=4).map(".".join)
patterns = paths | st.sampled_from(["^q", r"layers\.\d+", "q|v", ".*0", "(q)", "[qv]", "s?q", "v$", "layers.*q"])


@given(entries=st.lists(patterns, max_size=4), path=paths)
def test_patterns_fit_as_in_peft(entries, path):
    peft = pytest.importorskip("peft", reason=NO_PEFT)
    config = LoraConfig(rank_pattern={entry: number for number, entry in enumerate(entries, start=1)}, r=100)
    key = peft.utils.other.get_pattern_key(config.rank_pattern.keys(), path)
    assert config.rank_for(path) == config.rank_pattern.get(key, 100)


@pytest.mark.parametrize("kind", [list, tuple, set, frozenset])
def test_names_of_modules_become_sets(kind):
    config = LoraConfig(target_modules=kind(["q", "v"]), exclude_modules=kind(["head"]))
    assert config.target_modules == {"q", "v"}
    assert config.exclude_modules == {"head"}
    assert type(config.target_modules) is type(config.exclude_modules) is set


def test_a_regex_stays_text():
    assert LoraConfig(target_modules=".*q").target_modules == ".*q"


@given(
    r=st.integers(1, 512),
    rank_pattern=st.dictionaries(st.text(), st.integers(1, 512), max_size=3),
    alpha_pattern=st.dictionaries(st.text(), st.integers(0, 512) | st.floats(0, 512), max_size=3),
    lora_alpha=st.integers(0, 512) | st.floats(0, 512),
    lora_dropout=st.floats(0, 1),
    use_rslora=st.booleans(),
    init_lora_weights=st.sampled_from([True, False, "gaussian"]),
    target_modules=st.none() | st.text(min_size=1) | st.sets(st.text(min_size=1), min_size=1),
)
def test_a_config_survives_json(**values):
    config = LoraConfig(**values)
    text = json.dumps(config.to_dict(), default=sorted)
    assert LoraConfig.from_dict(json.loads(text)) == config


def test_runtime_settings_are_not_saved():
    config = LoraConfig(runtime_config=LoraRuntimeConfig(ephemeral_gpu_offload=True))
    assert config.runtime_config.ephemeral_gpu_offload
    assert "runtime_config" not in config.to_dict()
    read = LoraConfig.from_dict({"runtime_config": {"ephemeral_gpu_offload": True}})
    assert read.runtime_config == LoraRuntimeConfig(ephemeral_gpu_offload=False)


def test_an_unknown_key_of_a_file_is_refused_if_it_matters():
    assert LoraConfig.from_dict({"use_new_trick": False, "new_trick": None, "other": []}) == LoraConfig()
    with pytest.raises(ConfigError, match=r"LoraConfig does not know 'use_rslora2' \(value True\).*'use_rslora'"):
        LoraConfig.from_dict({"use_rslora2": True})


def test_copies_are_independent():
    config = LoraConfig(target_modules=["q"])
    config.copy().target_modules.add("v")
    assert config.target_modules == {"q"}


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason=NO_PEFT)


def test_fields_and_defaults_are_those_of_peft(peft):
    ours, theirs = LoraConfig(), peft.LoraConfig()
    assert [item.name for item in dataclasses.fields(ours)] == [item.name for item in dataclasses.fields(theirs)]
    assert dataclasses.asdict(ours) == dataclasses.asdict(theirs) | {"peft_version": ours.peft_version}


@pytest.mark.parametrize("settings", [{}, BUILT])
def test_files_are_those_of_peft(peft, settings, tmp_path):
    ours, theirs = LoraConfig(**settings), peft.LoraConfig(**settings)
    assert ours.to_dict().keys() == theirs.to_dict().keys()

    theirs.save_pretrained(tmp_path / "theirs")
    read = PeftConfig.from_pretrained(tmp_path / "theirs")
    assert type(read) is LoraConfig
    assert read == dataclasses.replace(ours, peft_version=theirs.peft_version)

    ours.save_pretrained(tmp_path / "ours")
    back = peft.PeftConfig.from_pretrained(tmp_path / "ours")
    assert back == dataclasses.replace(theirs, peft_version=ours.peft_version)


def test_default_targets_are_those_of_peft(peft):
    theirs = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    assert plain(DEFAULT_TARGETS) == plain(theirs)


def plain(mapping):
    return {kind: targets if isinstance(targets, str) else sorted(targets) for kind, targets in mapping.items()}
