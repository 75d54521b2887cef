"""The conformance kit finds what is wrong with plugins: each wrong one is caught by the check that is for it."""

import pytest
from testing.wrong import WRONG
from testing.wrong.page import PAGE, written
from testing.wrong.running import CHECKS, findings

CATCHES_NONE = {}
"""The checks that catch none of the wrong plugins, and why."""

PAIRS = [(wrong, check) for wrong in WRONG for check in wrong.checks]
RIGHT = {(wrong.base, check): wrong for wrong, check in PAIRS}


@pytest.mark.parametrize(("wrong", "check"), PAIRS, ids=str)
def test_wrong_plugin_is_caught(wrong, check, tmp_path, request):
    found = [*findings(wrong.plugin, check, wrong.place, tmp_path, request.getfixturevalue)]
    errors = [error for error in found if isinstance(error, Exception)]
    assert errors, f"{check} finds nothing wrong in {wrong}: {wrong.fault}"
    assert [error for error in errors if not isinstance(error, wrong.error)] == []


@pytest.mark.parametrize(("base", "check"), RIGHT, ids=lambda part: getattr(part, "__name__", part))
def test_right_plugin_passes(base, check, tmp_path, request):
    wrong = RIGHT[base, check]
    found = [*findings(wrong.right, check, wrong.usual_place, tmp_path, request.getfixturevalue)]
    assert [error for error in found if isinstance(error, Exception)] == []
    assert (None not in found) == wrong.declared, "A check that is skipped shows nothing."


def test_there_are_many():
    assert len({wrong.fault for wrong in WRONG}) == len(WRONG) >= 40


def test_every_check_catches_something():
    catching = {check for _, check in PAIRS}
    assert [check for check in CHECKS if check not in catching] == sorted(CATCHES_NONE)


def test_page_is_as_it_would_be_written():
    message = "run `python -m testing.wrong` in tests/, with the packages installed"
    assert PAGE.read_text(encoding="utf-8") == written(WRONG), message
