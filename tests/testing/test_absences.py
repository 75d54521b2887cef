"""Every installed method is checked, and what its classes leave out is what is allowed."""

import pytest
from testing.absences import ALLOWED, ROOT, classes_in, left_out, modules_with_classes, without_checks

from tunerkit.plugins import installed
from tunerkit.testing import MethodConformance
from tunerkit_ia3 import IA3Config
from tunerkit_lora import LoraConfig


class Lora(MethodConformance):
    def config(self):
        return LoraConfig()


class IA3(MethodConformance):
    def config(self):
        return IA3Config()


@pytest.fixture(scope="module")
def classes(request):
    with pytest.MonkeyPatch.context() as patch:
        for example in ROOT.glob("examples/*"):
            patch.syspath_prepend(example)  # the only packages here that are not installed
        return {place: case for file in modules_with_classes() for place, case in classes_in(file).items()}


def test_only_what_is_allowed_is_left_out(classes):
    found = {place: left_out(case) for place, case in classes.items() if left_out(case)}
    assert found == ALLOWED, "what classes leave out stands in tests/testing/absences.py"


def test_every_installed_method_is_checked(classes):
    methods = [row.method for row in installed() if row.kind == "method" and row.package is not None]
    assert methods
    assert without_checks(methods, classes.values()) == []


def test_method_without_checks_is_found():
    assert without_checks(["lora", "ia3"], [Lora]) == ["ia3"]
    assert without_checks(["lora", "ia3"], [Lora, IA3]) == []


@pytest.mark.parametrize("folder", ["plugins/tunerkit-foo/tests", "examples/tunerkit-foo/tests", "tests/deep/down"])
def test_classes_are_found_where_tests_are(tmp_path, folder):
    place = tmp_path / folder
    place.mkdir(parents=True)
    (place / "test_other.py").write_text("def test_nothing(): ...\n")
    (place / "test_foo.py").write_text(
        "from tunerkit.testing import MethodConformance\n\n\n"
        "class Foo(MethodConformance):\n    absent = {'test_rows': 'for the test'}\n\n\n"
        "class TestFoo(Foo):\n    xfail = {'test_pickle': 'for the test'}\n\n\n"
        "class TestOther: ...\n"
    )
    [file] = modules_with_classes(tmp_path)
    [(name, case)] = classes_in(file, tmp_path).items()
    assert name == f"{folder}/test_foo.py::TestFoo"
    assert left_out(case) == {"test_rows", "test_pickle"}
