"""Every difference from PEFT and every promise that the documentation tells is shown by a test, which it names.

An entry of `docs/differences.md` or `docs/reliability.md` is a point of one of its lists.
It ends with a comment that names the tests,
`<!-- tests: tests/test_model.py::test_something -->`; a test may also be a method, `file::Class::test`.
"""

import re
from pathlib import Path

import pytest
from messages import is_there

ROOT = Path(__file__).parents[2]
PAGES = {name: ROOT / "docs" / f"{name}.md" for name in ("differences", "reliability")}
ENTRY = re.compile(r"^- (?:.+\n)(?:^ .*\n|^\n(?= ))*", re.MULTILINE)
TESTS = re.compile(r"<!-- tests: (?P<tests>.+?) -->", re.DOTALL)


def entries_of(text):
    return [match[0] for match in ENTRY.finditer(text)]


def name_of(entry):
    return " ".join(entry.removeprefix("- ").split())[:60]


def named_in(entry):
    return [name for found in TESTS.finditer(entry) for name in found["tests"].split()]


ENTRIES = {name: entries_of(page.read_text(encoding="utf-8")) for name, page in PAGES.items()}


@pytest.mark.parametrize("entry", [entry for entries in ENTRIES.values() for entry in entries], ids=name_of)
def test_an_entry_names_tests_that_are_there(entry):
    tests = named_in(entry)
    assert tests, "no test shows it"
    assert [test for test in tests if not is_there(test)] == []


@pytest.mark.parametrize(("name", "least"), [("differences", 20), ("reliability", 10)])
def test_all_points_are_entries(name, least):
    text = PAGES[name].read_text(encoding="utf-8")
    assert len(ENTRIES[name]) == len(re.findall(r"^- ", text, re.MULTILINE)) > least


@pytest.mark.parametrize(
    ("reference", "there"),
    [
        ("tests/docs/test_differences.py::test_all_points_are_entries", True),
        ("tests/docs/test_differences.py::is_there", False),
        ("tests/docs/test_differences.py::test_nothing", False),
        ("tests/docs/test_differences.py", False),
        ("tests/none.py::test_nothing", False),
        ("tests/test_plan.py::TestUnsupported::test_default_target", True),
        ("tests/test_plan.py::TestUnsupported::test_nothing", False),
    ],
)
def test_references_are_followed(reference, there):
    assert is_there(reference) is there
