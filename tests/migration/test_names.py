"""The table of PEFT's names is whole and right: it is compared with the installed PEFT and with tunerkit's packages."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import pkgutil

import pytest

import tunerkit
import tunerkit_ia3
import tunerkit_lora
from tunerkit.migration.names import UNKNOWN, find, find_path, modules, table

peft = pytest.importorskip("peft", reason="comparing with PEFT needs it")

ENTRIES = sorted(table().values())
HERE = [entry for entry in ENTRIES if entry.place]
ALIASES = {"PeftError": "TunerkitError", "PeftMixedModel": "PeftModel", "PeftWarning": "TunerkitWarning"}


def label(entry):
    return f"{entry.module}.{entry.name}"


@pytest.fixture(scope="module")
def theirs():
    """All modules of PEFT's that can be imported here, by name."""
    found = {"peft": peft}
    for info in pkgutil.walk_packages(peft.__path__, "peft."):
        with contextlib.suppress(ImportError):  # of a library that is not installed
            found[info.name] = importlib.import_module(info.name)
    return found


# --- Against PEFT.


def test_every_public_name_is_in_the_table(theirs):
    missing = [
        f"{name}.{word}"
        for name, module in theirs.items()
        for word in getattr(module, "__all__", ())
        if find(name, word).reason == UNKNOWN
    ]
    assert missing == []


def test_every_public_name_of_the_package_has_a_line_of_its_own():
    lines = {entry.name for entry in ENTRIES if entry.module == "peft"}
    assert lines == {*peft.__all__, "__version__"}


@pytest.mark.parametrize("entry", ENTRIES, ids=label)
def test_what_the_table_names_is_in_peft(theirs, entry):
    assert entry.module in theirs
    assert entry.name == "*" or hasattr(theirs[entry.module], entry.name)


def test_a_module_gives_what_the_packages_above_it_give_under_a_name(theirs):
    checked = 0
    for name, module in theirs.items():
        for word, value in vars(module).items():
            entry = find(name, word)
            if entry.reason == UNKNOWN or entry.name == "*" or entry.module == name:
                continue
            checked += 1
            assert value is getattr(theirs[entry.module], entry.name), f"{name}.{word}"
    assert checked > 300


def test_modules(theirs):
    assert modules() <= set(theirs)
    assert {"peft", "peft.tuners", "peft.tuners.lora.layer", "peft.utils.hotswap"} <= modules()


# --- Against tunerkit.


@pytest.mark.parametrize("entry", HERE, ids=label)
def test_what_is_here_is_the_thing(theirs, entry):
    place = importlib.import_module(entry.place)
    mine, other = getattr(place, entry.now), getattr(theirs[entry.module], entry.name)
    assert entry.now in getattr(place, "__all__", [entry.now])
    if inspect.isclass(other) or inspect.isfunction(other):
        assert inspect.isclass(mine) is inspect.isclass(other)
        assert mine.__name__ == ALIASES.get(entry.name, entry.name)
    elif entry.name.startswith("TRANSFORMERS_MODELS_TO_"):
        assert {key: sorted(value) for key, value in mine.items()} == {
            key: sorted(value) for key, value in other.items()
        }
    elif isinstance(other, str):
        assert mine == other
    else:  # the tables of methods and tasks
        assert set(map(str, mine)) <= {str(getattr(key, "value", key)) for key in other}


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry.reason], ids=label)
def test_what_is_not_here_is_in_no_package(entry):
    packages = (tunerkit, tunerkit_lora, tunerkit_ia3)
    if entry.module == "peft" and entry.name != "__version__":
        assert not any(entry.name in package.__all__ for package in packages), "say in the table where it is"


# --- Finding.


def test_find():
    assert find("peft", "LoraConfig")[2:] == ("tunerkit_lora", "LoraConfig", "")
    assert find("peft.tuners.lora.layer", "LoraLayer").place == "tunerkit_lora"
    assert find("peft.tuners.lora.config", "LoraConfig").place == "tunerkit_lora"
    assert find("peft.tuners.vera.layer", "VeraLayer").reason == "of a method that is not built yet"
    assert find("peft.utils", "SAFETENSORS_WEIGHTS_NAME").now == "WEIGHTS_NAME"
    assert find("peft.tuners", "Linear") == ("peft.tuners", "Linear", "", "", UNKNOWN)


@pytest.mark.parametrize(
    ("path", "count", "place"),
    [
        ("peft.LoraConfig", 2, "tunerkit_lora"),
        ("peft.PeftModel.from_pretrained", 2, "tunerkit"),
        ("peft.tuners.lora.LoraLayer.forward", 4, "tunerkit_lora"),
        ("peft.tuners.lora.dora.LoraConfig.r", 5, "tunerkit_lora"),
        ("peft.something.else", 2, ""),
        ("peft.tuners.something", 3, ""),
    ],
)
def test_find_path(path, count, place):
    found, entry = find_path(path.split("."))
    assert (found, entry.place) == (count, place)


def test_a_path_that_ends_with_a_module():
    assert find_path(["peft"]) == (1, None)
    assert find_path(["peft", "tuners", "lora"]) == (3, None)
