from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tunerkit.demo import data
from tunerkit.demo.data import Pair, read_pairs, read_split, split_pairs
from tunerkit.demo.errors import DemoError

SOURCE = '''
def close(fd, *, force: bool = False) -> None:
    """Close a file descriptor for good.  A second sentence."""

async def fetch_page(url):
    """Ask a server
    for one page, and wait

    The details.
    """

def undocumented():
    pass

def short():
    """Too few words."""

def remove_item(key):
    """Works like remove_item of the other class does."""

def copy_tree(depth=None):
    """src to be copied, dst to be written, depth=None."""

def outer():
    def inner():
        """This one lies inside of another function."""

class Box:
    """The docstring of a class describes no function."""

    def _put(self, item):
        """Take in one more item to keep."""

    class Lid:
        def lift(self):
            """Make the inside of it visible again!"""
'''


def write(root: Path, **modules: str) -> Path:
    for name, source in modules.items():
        path = root.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return root


def function(name: str, sentence: str, arguments: str = "x") -> str:
    return f'def {name}({arguments}):\n    """{sentence}"""\n'


@pytest.fixture(scope="module")
def split():
    return read_split()


class TestReadPairs:
    def test_sentence_and_signature(self, tmp_path):
        found = read_pairs(write(tmp_path, tools__io=SOURCE))
        assert found == [
            Pair("Close a file descriptor for good.", "def close(fd, *, force: bool=False) -> None:", "tools.io"),
            Pair("Ask a server for one page, and wait", "async def fetch_page(url):", "tools.io"),
            Pair("Take in one more item to keep.", "def _put(self, item):", "tools.io"),
            Pair("Make the inside of it visible again!", "def lift(self):", "tools.io"),
        ]

    def test_a_sentence_or_a_line_that_occurs_again_is_left_out(self, tmp_path):
        first = function("one", "What it does is said here.")
        same_sentence = function("two", "What it does is said here.")
        same_line = function("one", "Something else is described by this.")
        assert [pair.line for pair in read_pairs(write(tmp_path, a=first, b=same_sentence, c=same_line))] == [
            "def one(x):"
        ]

    def test_what_a_dropped_pair_used_stays_used(self, tmp_path):
        first = function("one", "What it does is said here.")
        second = function("two", "What it does is said here.")
        third = function("two", "Only the line has been seen before.")
        assert len(read_pairs(write(tmp_path, a=first, b=second, c=third))) == 1

    @pytest.mark.parametrize("folder", ["test", "site-packages", "tkinter"])
    def test_skipped_folders(self, tmp_path, folder):
        write(tmp_path / folder, module=function("one", "What it does is said here."))
        assert read_pairs(tmp_path) == []

    @pytest.mark.parametrize("source", ["def broken(:\n", "x = '\x00'\n"])
    def test_modules_that_do_not_parse(self, tmp_path, source):
        write(tmp_path, a=source, b=function("one", "What it does is said here."))
        assert [pair.module for pair in read_pairs(tmp_path)] == ["b"]

    def test_old_escapes_warn_nobody(self, tmp_path):
        write(tmp_path, a=function("one", "What it does is said here.") + "x = '\\d'\n")
        assert len(read_pairs(tmp_path)) == 1


class TestSpells:
    @pytest.mark.parametrize(
        ("sentence", "name", "spelled"),
        [
            ("Calls remove_item for each", "remove_item", True),
            ("Calls `remove_item`.", "_remove_item", True),
            ("Close the file", "close", False),
            ("Files are closed", "close", False),
            ("Works like close()", "close", True),
            ("Shows the _ of the last line", "_", True),
        ],
    )
    def test_spells(self, sentence, name, spelled):
        assert data.spells(sentence, name) is spelled


class TestSplit:
    def test_sizes(self, split):
        assert len(split.train) == 2000
        assert len(split.held_out) == 600

    def test_no_package_and_so_no_module_is_on_both_sides(self, split):
        assert {pair.package for pair in split.train}.isdisjoint(pair.package for pair in split.held_out)

    def test_deterministic(self, split):
        assert read_split() == split

    def test_every_sentence_has_one_right_answer(self, split):
        pairs = split.train + split.held_out
        assert len({pair.sentence for pair in pairs}) == len({pair.line for pair in pairs}) == len(pairs)

    def test_the_line_holds_the_signature_alone(self, split):
        for pair in split.train + split.held_out:
            tree = ast.parse(pair.line + " pass").body[0]
            assert isinstance(tree, (ast.FunctionDef, ast.AsyncFunctionDef))
            assert pair.sentence not in pair.line
            assert not re.search(rf"\b{re.escape(tree.name)}\b", pair.sentence)

    def test_the_order_of_the_modules_does_not_matter(self):
        pairs = [Pair(f"sentence {i}", f"def f{i}():", f"package{i % 7}.m{i % 3}") for i in range(70)]
        wanted = split_pairs(pairs, Path("lib"), train=30, held_out=20)
        assert split_pairs(pairs[::-1], Path("lib"), train=30, held_out=20) == wanted

    def test_too_few(self, tmp_path):
        write(tmp_path, a=function("one", "What it does is said here."))
        with pytest.raises(DemoError) as caught:
            read_split(tmp_path)
        assert str(caught.value) == (
            f"The Python sources in {str(tmp_path)!r} give 0 pairs to train on and 1 to hold out; the demo needs 2000 "
            "and 600. Run it with a Python whose standard library is there as .py files (not only compiled or zipped)."
        )
