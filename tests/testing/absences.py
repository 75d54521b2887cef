"""The checks of the conformance kit that classes of this repository may leave out, and how those classes are found.

`ALLOWED` is the one list of them: by the place of the class, the names of the checks. The reasons stand in the classes
(`absent` and `xfail`), from which the report tells them. A class that leaves out more, or less, fails a test.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from tunerkit.naming import peft_type_name
from tunerkit.testing import MethodConformance

ROOT = Path(__file__).parents[2]

LORA = "plugins/tunerkit-lora/tests/test_conformance.py"
BITSANDBYTES = "plugins/tunerkit-bitsandbytes/tests/test_conformance.py"
TOYS = "tests/test_toys_conformance.py"
QUANTISED = {
    "test_double_precision",
    "test_exports",
    "test_gradients",
    "test_half_precision_base",
    "test_merge_and_unload",
    "test_merge_keeps_the_output",
    "test_mixes_with_another_method",
    "test_modules_to_save",
    "test_two_adapters_merge",
    "test_two_adapters_merge_one_by_one",
}
BY_HAND = {
    "test_gradients_of_rows",
    "test_mixes_with_another_method",
    "test_rows",
    "test_threads",
    "test_use_adapter",
    "test_use_adapter_holds_in_the_backward",
    "test_use_adapter_is_of_this_thread",
}

ALLOWED = {
    f"{LORA}::TestDora": {"test_gradients"},
    f"{LORA}::TestLoftq": {"test_identity_at_start"},
    f"{LORA}::TestLoftqWithDora": {"test_gradients", "test_identity_at_start"},
    f"{LORA}::TestPissaWithDora": {"test_gradients"},
    f"{BITSANDBYTES}::TestLoraOnFourBits": {*QUANTISED, "test_state_dict"},
    f"{BITSANDBYTES}::TestLoraOnEightBits": QUANTISED,
    f"{BITSANDBYTES}::TestDoraOnFourBits": {*QUANTISED, "test_state_dict"},
    f"{BITSANDBYTES}::TestIA3OnFourBits": {*QUANTISED, "test_state_dict"},
    f"{BITSANDBYTES}::TestIA3OnEightBits": QUANTISED,
    f"{TOYS}::TestShared": {"test_compiles"},
    f"{TOYS}::TestSharedAndTrained": {"test_compiles"},
    f"{TOYS}::TestHooksByHand": BY_HAND,
    f"{TOYS}::TestTunerByHand": BY_HAND,
}


def modules_with_classes(root=ROOT):
    """Return the test modules that subclass `MethodConformance`: of the plugins, of the examples, and of the core."""
    folders = [*root.glob("plugins/*/tests"), *root.glob("examples/*/tests"), root / "tests"]
    files = sorted(file for folder in folders for file in folder.rglob("test_*.py"))
    return [file for file in files if "(MethodConformance)" in file.read_text(encoding="utf-8")]


def classes_in(file, root=ROOT):
    """Return the classes of checks that pytest collects in a module, by their place."""
    name = "_".join(file.relative_to(root).with_suffix("").parts)
    spec = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return {
        f"{file.relative_to(root).as_posix()}::{key}": value
        for key, value in vars(module).items()
        if key.startswith("Test") and isinstance(value, type) and issubclass(value, MethodConformance)
    }


def left_out(case):
    """Return the names of the checks that a class does not run, or lets fail."""
    return {*case.absent, *case.xfail}


def without_checks(methods, classes):
    """Return the ids of those methods for which there is no class of checks."""
    checked = {case().config().peft_type for case in classes}
    return [method for method in methods if peft_type_name(method) not in checked]
