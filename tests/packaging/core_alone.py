"""The core with no method installed and none of its optional dependencies; `tox -e isolated` runs this file by name."""

import importlib
import importlib.util
import pkgutil

import pytest
from click.testing import CliRunner

import tunerkit
from tunerkit.cli import main
from tunerkit.plugins import get_method, installed

OPTIONAL = ("accelerate", "huggingface_hub", "peft", "transformers")


def test_environment_holds_the_core_alone():
    assert [name for name in OPTIONAL if importlib.util.find_spec(name)] == []
    assert installed() == []


@pytest.mark.parametrize("name", [info.name for info in pkgutil.walk_packages(tunerkit.__path__, "tunerkit.")])
def test_every_module_can_be_imported(name):
    if not name.endswith("__main__"):
        importlib.import_module(name)


def test_no_methods_are_listed():
    result = CliRunner().invoke(main, ["plugins", "--check"])
    assert result.exit_code == 0, result.output
    assert "No methods are installed" in result.output


def test_a_missing_method_is_named_with_its_package():
    with pytest.raises(tunerkit.errors.UnknownMethodError, match="tunerkit-lora"):
        get_method("lora")
