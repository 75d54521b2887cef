"""What is to be done to a module is done once it is imported."""

import importlib
import inspect
import sys

import pytest

from tunerkit.integrations.imports import after_import


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module that can be imported and is not yet."""
    (tmp_path / "toy_module.py").write_text("value = 1\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "toy_module", raising=False)
    yield "toy_module"
    sys.modules.pop("toy_module", None)


def test_later(module):
    seen = []
    after_import(module, lambda found: seen.append(found.value))
    assert seen == []
    found = importlib.import_module(module)
    assert seen == [1]
    assert found.__loader__ is found.__spec__.loader
    assert inspect.getsource(found) == "value = 1\n"


def test_now(module):
    seen = []
    found = importlib.import_module(module)
    after_import(module, seen.append)
    assert seen == [found]


def test_once(module):
    seen = []
    after_import(module, seen.append)
    after_import(module, seen.append)
    found = importlib.import_module(module)
    after_import(module, seen.append)
    assert seen == [found]


def test_a_module_that_is_not_there():
    seen = []
    after_import("toy_missing", seen.append)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("toy_missing")
    assert importlib.util.find_spec("toy_missing") is None
    assert seen == []


def test_a_module_that_cannot_be_imported(module, tmp_path):
    (tmp_path / "toy_module.py").write_text("1 / 0\n", encoding="utf-8")
    seen = []
    after_import(module, seen.append)
    with pytest.raises(ZeroDivisionError):
        importlib.import_module(module)
    (tmp_path / "toy_module.py").write_text("value = 22222\n", encoding="utf-8")
    importlib.invalidate_caches()
    assert importlib.import_module(module).value == 22222
    assert len(seen) == 1
