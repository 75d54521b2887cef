"""`docs/messages.md` has every message that tunerkit's source can make, as a test reads it; see `messages.py`."""

import ast
import warnings

import messages
import pytest
from messages import PAGE, Recorder, Row, Site, is_known, rows_of, sites, sites_in, written

from tunerkit.errors import CheckpointNotFoundError, LoadWarning, MergeError

PAGE_TEXT = PAGE.read_text(encoding="utf-8")
ROWS = rows_of(PAGE_TEXT)
SITES = sites()
AGAIN = "run `tox -e messages`, or give it the test files that read them"

NO_ROW = {}
"""Places whose message no test reads, and why."""


def place(site):
    return f"{site.module} {site.function} {site.kind}"


class TestPage:
    def test_has_every_message(self):
        missing = {f"{place(site)}: {site.pattern}" for site in SITES if not any(site.makes(row) for row in ROWS)}
        assert {line for line in missing if line.partition(":")[0] not in NO_ROW} == set(), AGAIN

    def test_has_no_other(self):
        assert [row for row in ROWS if not any(site.makes(row) for site in SITES)] == [], AGAIN

    def test_names_tests_that_are_there(self):
        assert [row.test for row in ROWS if not is_known(row.test)] == [], AGAIN

    def test_reasons_are_needed(self):
        assert set(NO_ROW) <= {place(site) for site in SITES if not any(site.makes(row) for row in ROWS)}

    def test_is_as_it_would_be_written(self):
        assert written(ROWS) == PAGE_TEXT

    def test_has_messages_of_all_packages(self):
        silent = {"tunerkit_bitsandbytes"}  # it tells the core why a layer is not adapted, and that says so
        assert {row.module.partition(".")[0] for row in ROWS} == {path.name for path in messages.PACKAGES} - silent
        assert len(ROWS) > 300


# What is found in the source


def found(source):
    tree = ast.parse(source)
    return [(site.function, site.kind, site.pattern) for site in sites_in(tree, "m", messages.kinds_in([tree]))]


@pytest.mark.parametrize(
    ("body", "kind", "pattern"),
    [
        ("raise MergeError('It is so.')", "MergeError", r"It\ is\ so\."),
        ("raise errors.MergeError(f'{x} is so.') from None", "MergeError", r".*\ is\ so\."),
        ("return MergeError('a' 'b')", "MergeError", "ab"),
        ("msg = 'a'\n  raise MergeError(msg)", "MergeError", "a"),
        ("msg = 'a'\n  raise MergeError(msg)\n  msg = 'b'", "MergeError", "a"),
        ("raise MergeError(told())", "MergeError", ".*"),
        ("msg = 'a'\n  msg += x\n  raise MergeError(msg)", "MergeError", "a.*"),
        ("warnings.warn(LoadWarning('a'), stacklevel=2)", "LoadWarning", "a"),
        ("warnings.warn('a', LoadWarning, stacklevel=2)", "LoadWarning", "a"),
        ("def inner(): raise MergeError('a')\n  inner()", "MergeError", "a"),
    ],
)
def test_places_are_found(body, kind, pattern):
    source = f"class MergeError(TunerkitError): pass\nclass LoadWarning(TunerkitWarning): pass\ndef f(x):\n  {body}"
    [(function, *rest)] = found(source)
    assert function == ("f.inner" if "inner" in body else "f")
    assert rest == [kind, pattern]


def test_each_of_several_values():
    source = "def f(error: type[TunerkitError], x):\n if x: msg = 'a'\n else: msg = 'b'\n raise error(msg)"
    assert [pattern for _, _, pattern in found(source)] == ["a", "b"]


def test_the_value_since_the_last_use_counts():
    source = "def f(x):\n msg = 'a'\n if x:\n  raise MergeError(msg)\n msg = 'b'\n raise MergeError(msg)"
    source = f"class MergeError(TunerkitError): pass\n{source}\n raise MergeError(msg)"
    assert [pattern for _, _, pattern in found(source)] == ["a", "b", "b"]
    assert [
        pattern for _, _, pattern in found(source.replace("raise MergeError(msg)", "warn(MergeError(msg))", 1))
    ] == [
        "a",
        "b",
        "b",
    ]


def test_a_class_that_the_caller_tells():
    assert found("def f(error: type[TunerkitError]): raise error('a')") == [("f", "TunerkitError", "a")]


@pytest.mark.parametrize("body", ["raise ValueError('a')", "raise error", "warnings.warn('a', Other)", "f('a', x)"])
def test_other_places_are_not(body):
    assert found(f"def f(error): {body}") == []


# What is heard from tests


class Heard:
    """A recorder that listens, and what it has heard."""

    def __init__(self, monkeypatch, folder):
        self.recorder = Recorder()
        self.recorder.test = "tests/test_x.py::test_y"
        self.recorder.folder = folder.parent
        self.recorder.listen(monkeypatch)

    def __call__(self):
        return [(kind, text) for (_, _, kind, _), texts in self.recorder.heard.items() for text in texts]


@pytest.fixture
def heard(monkeypatch, tmp_path):
    return Heard(monkeypatch, tmp_path)


class TestRecorder:
    def test_matched_error(self, heard):
        with pytest.raises(MergeError, match="text"):
            raise MergeError("a text")
        assert heard() == [("MergeError", "a text")]

    def test_error_that_is_read_later(self, heard):
        with pytest.raises(MergeError) as caught:
            raise MergeError("a text")
        assert heard() == []
        assert str(caught.value) == "a text"
        assert heard() == [("MergeError", "a text")]

    def test_error_that_is_a_builtin_with_arguments_of_its_own(self, heard):
        with pytest.raises(FileNotFoundError, match="text"):
            raise CheckpointNotFoundError("a text")
        assert heard() == [("CheckpointNotFoundError", "a text")]

    def test_warning(self, heard):
        with pytest.warns(LoadWarning, match="text"):
            warnings.warn(LoadWarning("a text"), stacklevel=1)
        assert heard() == [("LoadWarning", "a text")]

    def test_warning_by_class_and_read_later(self, heard):
        with pytest.warns(LoadWarning) as caught:
            warnings.warn("a text", LoadWarning, stacklevel=1)
        assert heard() == []
        assert str(caught[0].message) == "a text"
        assert heard() == [("LoadWarning", "a text")]

    def test_others_are_not(self, heard):
        with pytest.raises(ValueError, match="text"):
            raise ValueError("a text")
        with pytest.warns(UserWarning, match="text"):
            warnings.warn("a text", stacklevel=1)
        with pytest.raises(MergeError, match="text"), pytest.raises(LookupError):
            raise MergeError("a text")
        assert heard() == [("MergeError", "a text")]

    def test_what_differs_from_run_to_run_is_left_out(self, heard, tmp_path):
        text = f"'{tmp_path}/adapter' at {object()!r} in {tmp_path}, '{messages.ROOT}/docs'\n  and more"
        with pytest.raises(MergeError, match="and more"):
            raise MergeError(text)
        [(_, told)] = heard()
        assert told == ("'/path/to/adapter' at <object object at 0x...> in /path/to, '/path/to/tunerkit/docs' and more")

    def test_quoted_error(self, heard):
        reason = MergeError("a reason")
        with pytest.raises(CheckpointNotFoundError, match="because"):
            raise CheckpointNotFoundError(f"It cannot be, because of {reason}.") from reason
        assert sorted(heard()) == [
            ("CheckpointNotFoundError", "It cannot be, because of a reason."),
            ("MergeError", "a reason"),
        ]

    @pytest.mark.parametrize(
        ("texts", "shown"),
        [
            ([("b", "text of b"), ("a", "longer text of a")], "longer text of a"),
            ([("b", "text of b"), ("a", "long text" * 99)], "text of b"),
            ([("a", "a text"), ("a", "text")], "text"),
        ],
    )
    def test_one_example_of_a_message_is_shown(self, heard, texts, shown):
        site = Site("m", "f", "MergeError", ".*text.*", range(1, 3))
        heard.recorder.sites = [site]
        for test, text in texts:
            heard.recorder.heard["m", 2, "MergeError", f"tests/{test}.py::test_x"].add(text)
        assert [row.text for row in heard.recorder.rows([])] == [shown]

    def test_messages_that_come_from_elsewhere_are_told_apart_by_their_words(self, heard):
        heard.recorder.sites = [Site("m", "f", "MergeError", ".*", range(1, 3))]
        texts = {"There is no 'a' (1).", "There is no 'b' (2).", "It is merged."}
        heard.recorder.heard["m", 2, "MergeError", "tests/a.py::test_x"] |= texts
        assert {row.text for row in heard.recorder.rows([])} == {"There is no 'a' (1).", "It is merged."}

    def test_rows_of_tests_that_did_not_run_stay(self, heard):
        first, second, *_ = sorted(ROWS, key=lambda row: row.test)
        gone = Row(first.kind, first.text, first.module, first.function, "tests/none.py::test_nothing")
        assert heard.recorder.rows([gone]) == set()
        assert heard.recorder.rows([first, gone]) == {first}
        heard.recorder.ran = {first.test}
        assert first not in heard.recorder.rows([first, second])


@pytest.mark.parametrize(
    ("reference", "known"),
    [
        ("tests/docs/test_messages.py::TestRecorder::test_warning", True),
        ("plugins/tunerkit-lora/tests/test_conformance.py::TestLora::test_two_adapters_merge_one_by_one", True),
        ("plugins/tunerkit-lora/tests/test_conformance.py::TestLora::test_nothing", False),
        ("plugins/tunerkit-lora/tests/test_conformance.py::TestNone::test_two_adapters_merge_one_by_one", False),
    ],
)
def test_tests_are_found(reference, known):
    assert is_known(reference) is known


@pytest.mark.parametrize("text", ["plain", "with `ticks`", "a | b", "`x`"])
def test_rows_are_read_as_they_were_written(text):
    row = Row("MergeError", text, "tunerkit.merge", "f", "tests/test_x.py::test_y")
    assert rows_of(written([row])) == [row]
