import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunerkit import PeftConfig
from tunerkit.config import built_settings
from tunerkit.errors import ConfigError
from tunerkit_ia3.config import IA3Config, among
from tunerkit_ia3.targets import DEFAULT_FEEDFORWARD, DEFAULT_TARGETS

NO_PEFT = "comparing with PEFT needs it: pip install peft"

BUILT = {
    "target_modules": ["q", "up"],
    "exclude_modules": "head.*",
    "modules_to_save": ["head"],
    "feedforward_modules": ["up"],
    "init_ia3_weights": False,
    "fan_in_fan_out": True,
    "task_type": "SEQ_CLS",
    "revision": "main",
}


def test_the_readme_lists_what_is_built():
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert [name for name in built_settings(IA3Config) if f"`{name}`" not in text] == []


def test_every_field_is_built():
    common = {item.name for item in dataclasses.fields(PeftConfig)}
    own = {item.name for item in dataclasses.fields(IA3Config)} - common
    assert own == {*BUILT} - common
    assert {*built_settings(IA3Config)} == own


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"feedforward_modules": 3},
            "IA3Config.feedforward_modules must be a list of text or text or None; it is 3 of type int.",
        ),
        ({"init_ia3_weights": "no"}, "IA3Config.init_ia3_weights must be True or False; it is 'no' of type str."),
        ({"peft_type": "OTHER"}, "IA3Config is the config of IA3; its peft_type cannot be 'OTHER'."),
        (
            {"target_modules": ["k", "v"], "feedforward_modules": ["down", "k", "up"]},
            (
                "IA3Config.feedforward_modules holds 'down', 'up', which can mean none of target_modules: 'k', 'v'. "
                "Add the modules to target_modules, or leave them out here."
            ),
        ),
    ],
)
def test_a_wrong_setting_is_named(values, message):
    with pytest.raises(ConfigError) as error:
        IA3Config(**values)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("targets", "feedforward"),
    [
        (["k", "mlp.down"], ["mlp.down"]),
        (["k", "mlp.down"], ["down"]),
        (["k", "down"], ["mlp.down"]),
        (["k"], []),
        (["k"], "down"),
        (".*k", ["down"]),
        ("all-linear", ["down"]),
        (None, ["down"]),
        (["k"], None),
    ],
)
def test_feedforward_modules_that_can_be_targeted(targets, feedforward):
    config = IA3Config(target_modules=targets, feedforward_modules=feedforward)
    assert config.feedforward_modules == (set(feedforward) if isinstance(feedforward, list) else feedforward)


@pytest.mark.parametrize(
    ("feedforward", "names"),
    [
        (None, []),
        ([], []),
        (["down"], ["0.down", "1.down", "1.updown"]),
        (["1.down", "k"], ["1.down", "k"]),
        (r"\d\.down", ["0.down", "1.down"]),
        ("down", []),
    ],
)
def test_which_modules_are_feedforward(feedforward, names):
    config = IA3Config(target_modules="all-linear", feedforward_modules=feedforward)
    assert [name for name in ("0.down", "1.down", "1.updown", "k") if config.is_feedforward(name)] == names


def test_entries_among_the_targets():
    entries = ["down", "layer.mlp.down", "mlp.up", "v"]
    assert among(["k", "mlp.down"], entries) == {"down", "layer.mlp.down"}
    assert among([], entries) == set()


def test_a_file_may_hold_feedforward_modules_that_are_not_targeted():
    read = IA3Config.from_dict({"target_modules": ["k", "v"], "feedforward_modules": ["down", "v"]})
    assert read.feedforward_modules == {"v"}
    read = IA3Config.from_dict({"target_modules": "all-linear", "feedforward_modules": ["down"]})
    assert read.feedforward_modules == {"down"}


names = st.text("abc.", min_size=1, max_size=5)


@given(
    targets=st.none() | names | st.sets(names),
    feedforward=st.none() | names | st.sets(names),
    init_ia3_weights=st.booleans(),
)
def test_a_config_survives_json(targets, feedforward, init_ia3_weights):
    if isinstance(targets, set) and isinstance(feedforward, set):
        feedforward = among(targets, feedforward)
    config = IA3Config(target_modules=targets, feedforward_modules=feedforward, init_ia3_weights=init_ia3_weights)
    text = json.dumps(config.to_dict(), default=sorted)
    assert IA3Config.from_dict(json.loads(text)) == config


@pytest.mark.parametrize("kind", [list, tuple, set, frozenset])
def test_names_of_modules_become_sets(kind):
    config = IA3Config(target_modules=kind(["q", "up"]), feedforward_modules=kind(["up"]))
    assert config.target_modules == {"q", "up"}
    assert config.feedforward_modules == {"up"}
    assert type(config.target_modules) is type(config.feedforward_modules) is set


def test_default_feedforward_modules_are_default_targets():
    assert DEFAULT_FEEDFORWARD.keys() == DEFAULT_TARGETS.keys()
    assert all(set(DEFAULT_FEEDFORWARD[kind]) <= set(DEFAULT_TARGETS[kind]) for kind in DEFAULT_TARGETS)


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason=NO_PEFT)


def test_fields_and_defaults_are_those_of_peft(peft):
    ours, theirs = IA3Config(), peft.IA3Config()
    assert [item.name for item in dataclasses.fields(ours)] == [item.name for item in dataclasses.fields(theirs)]
    assert dataclasses.asdict(ours) == dataclasses.asdict(theirs) | {"peft_version": ours.peft_version}


@pytest.mark.parametrize("settings", [{}, BUILT])
def test_files_are_those_of_peft(peft, settings, tmp_path):
    ours, theirs = IA3Config(**settings), peft.IA3Config(**settings)
    assert ours.to_dict().keys() == theirs.to_dict().keys()

    theirs.save_pretrained(tmp_path / "theirs")
    read = PeftConfig.from_pretrained(tmp_path / "theirs")
    assert type(read) is IA3Config
    assert read == dataclasses.replace(ours, peft_version=theirs.peft_version)

    ours.save_pretrained(tmp_path / "ours")
    back = peft.PeftConfig.from_pretrained(tmp_path / "ours")
    assert back == dataclasses.replace(theirs, peft_version=ours.peft_version)


@pytest.mark.parametrize(
    ("ours", "name"),
    [
        (DEFAULT_TARGETS, "TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING"),
        (DEFAULT_FEEDFORWARD, "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING"),
    ],
)
def test_default_modules_are_those_of_peft(peft, ours, name):
    theirs = getattr(peft.utils.constants, name)
    assert {kind: sorted(modules) for kind, modules in ours.items()} == {
        kind: sorted(modules) for kind, modules in theirs.items()
    }
