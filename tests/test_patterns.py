from __future__ import annotations

import re
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunerkit import patterns
from tunerkit.errors import TargetError
from tunerkit.patterns import Patterns, count_patterns, hold_settings, pattern_value


@pytest.mark.parametrize(
    ("pattern", "path", "fits"),
    [
        ("q", "layers.0.q", True),
        ("q", "layers.0.seq", False),
        ("q", "q", True),
        ("q", "q.base", False),
        (r"layers\.\d+", "model.layers.12", True),
        ("^layers.0", "layers.0", True),
        ("^layers.0", "model.layers.0", False),
        ("q|v", "layers.0.v", True),
        ("0.q", "layers.10.q", False),
        ("layers.0.q", "model.layers.0.q", True),
        ("layers.0.q", "model.layers_0.q", True),
        ("layers.0.q", "model.layers.10.q", False),
        ("0.q", "layers.0.0.q", True),
        ("a.b", "a\nb", False),
        ("a", "a\n", True),
    ],
)
def test_fit_a_path_or_its_end(pattern, path, fits):
    assert Patterns((pattern,)).fitting(path) == ([pattern] if fits else [])
    assert pattern_value({pattern: 1}, path, 2) == (1 if fits else 2)


def test_the_first_that_fits_counts():
    assert pattern_value({"v": 1, ".*": 2, "q": 3}, "layers.q", 4) == 2
    assert pattern_value({"layers.q": 1, ".*": 2, "q": 3}, "layers.q", 4) == 1
    assert pattern_value({}, "q", 4) == 4
    assert pattern_value(None, "q", 4) == 4


def test_a_dict_that_is_changed():
    given = {"q": 1}
    assert pattern_value(given, "q", 4) == 1
    given["q"] = 2
    assert pattern_value(given, "q", 4) == 2
    del given["q"]
    given["v"] = 3
    assert pattern_value(given, "q", 4) == 4


def test_during_a_call_they_are_read_once():
    given, other = {"q": 1}, {"v": 2}

    @hold_settings
    def call():
        assert pattern_value(given, "q", 4) == 1
        assert pattern_value(other, "q", 4) == 4
        assert pattern_value(other, "v", 4) == 2
        given["v"] = 3  # against the rule
        assert pattern_value(given, "v", 4) == 4
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call()
    assert pattern_value(given, "v", 4) == 3


text = st.text("ab.-0\n", max_size=6)
entries = st.lists(text | st.sampled_from(["^a", "a|b", "a$", "[ab]", ".*b", "a{2}", r"a\.b"]), unique=True)


def plainly(entry, path):
    return re.match(rf"(.*\.)?({entry})$", path) is not None


@given(entries=entries, path=text)
def test_what_is_looked_up_is_what_the_regexes_fit(entries, path):
    assert Patterns(tuple(entries)).fitting(path) == [entry for entry in entries if plainly(entry, path)]


@given(paths=st.lists(text, max_size=4), entries=st.lists(text, unique=True, max_size=6))
def test_counts(paths, entries):
    config = types.SimpleNamespace(_patterns=("ranks", "none"), ranks=dict.fromkeys(entries, 1), none=None)
    expected = {entry: sum(plainly(entry, path) for path in paths) for entry in entries}
    assert count_patterns(config, paths) == {"ranks": expected, "none": {}}


@pytest.mark.parametrize("entry", ["a(", "[a"])
def test_broken_ones(entry):
    config = types.SimpleNamespace(_patterns=("ranks",), ranks={"a": 1, entry: 2})
    with pytest.raises(TargetError, match=r"ranks holds .*a broken one: .*\. Mend it"):
        count_patterns(config, ["a"])


def test_paths_are_not_tried_one_by_one(monkeypatch):
    names = {f"layers.{index}.mlp.up": index for index in range(300)}
    monkeypatch.setattr(patterns, "_regex", None)
    assert [pattern_value(names, f"model.{name}", -1) for name in names] == list(names.values())
