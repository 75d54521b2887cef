"""Pairs of a sentence and the function it describes, read from the source of Python's own standard library.

The sentence is the first one of a function's docstring; the line is the function's `def` with its name and signature
and nothing of the docstring. Three rules keep the task honest:

* Each sentence and each line occurs once in all pairs, so that every sentence has exactly one right answer.
* A sentence that spells out the function's name or its parameters (`depth=None`) is left out: finding it is string
  matching. Ordinary words that the sentence and the name share ("Close the file." and `close`) stay, as they would in a
  real search.
* The two sides of the split share no module, not even one of the same package: a package's modules resemble each other.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tunerkit.demo.errors import DemoError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

TRAIN_PAIRS = 2000
HELD_OUT_PAIRS = 600

# Packages that distributors ship separately or that newer Pythons lack: without them the pairs depend less on the
# installation. The rest is installed packages, tests, and data in the form of modules.
SKIPPED = frozenset(
    {
        *("__pycache__", "dist-packages", "site-packages", "encodings", "ensurepip", "pydoc_data", "test", "tests"),
        *("distutils", "idlelib", "lib2to3", "tkinter", "turtle", "turtledemo"),
    }
)
FEWEST_WORDS, MOST_WORDS = 5, 40
SENTENCE_END = re.compile(r"(?<=[.!?])\s|\n\s*\n")


@dataclass(frozen=True)
class Pair:
    """A sentence and the function it describes.

    Attributes:
        sentence: The first sentence of the docstring, on one line.
        line: The function's `def`, on one line.
        module: The dotted name of the module that holds the function.
    """

    sentence: str
    line: str
    module: str

    @property
    def package(self) -> str:
        """The top-level package or module; the sides of the split share none."""
        return self.module.partition(".")[0]


@dataclass(frozen=True)
class Split:
    """The pairs to train on and the pairs held out."""

    train: tuple[Pair, ...]
    held_out: tuple[Pair, ...]


def read_split(root: Path | None = None, *, train: int = TRAIN_PAIRS, held_out: int = HELD_OUT_PAIRS) -> Split:
    """Read all pairs and split them.

    Args:
        root: The folder with the library's sources; the running Python's standard library if not given.
        train: How many pairs to train on.
        held_out: How many pairs to hold out.

    Raises:
        DemoError: The sources hold fewer pairs than asked for.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    return split_pairs(read_pairs(root), root, train=train, held_out=held_out)


def read_pairs(root: Path) -> list[Pair]:
    """Read the pairs of every module below a folder, in the order of the modules' names; nothing is imported."""
    pairs: list[Pair] = []
    sentences: set[str] = set()
    lines: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED.intersection(parts):
            continue
        for pair in read_module(path, ".".join(parts)):
            if pair.sentence not in sentences and pair.line not in lines:
                pairs.append(pair)
            sentences.add(pair.sentence)
            lines.add(pair.line)
    return pairs


def read_module(path: Path, module: str) -> Iterator[Pair]:
    """Read one module's pairs; a module that cannot be parsed has none."""
    try:
        with warnings.catch_warnings():
            # Compiling old sources warns about their escapes, which is no concern of the demo's user.
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for function in find_functions(tree.body):
        sentence = first_sentence(function)
        if sentence is not None:
            yield Pair(sentence, signature(function), module)


def find_functions(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Find the functions of a module and the methods of its classes; functions inside functions are left out."""
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield statement
        elif isinstance(statement, ast.ClassDef):
            yield from find_functions(statement.body)


def first_sentence(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str | None:
    """Return the sentence that describes a function, or `None` if it has none that is fit for the task."""
    docstring = ast.get_docstring(function)
    if not docstring:
        return None
    sentence = " ".join(SENTENCE_END.split(docstring.strip(), maxsplit=1)[0].split())
    words = re.findall(r"[A-Za-z]{2,}", sentence)
    if not FEWEST_WORDS <= len(words) <= MOST_WORDS or "=" in sentence or spells(sentence, function.name):
        return None
    return sentence


def spells(sentence: str, name: str) -> bool:
    """Whether a sentence contains a function's name as it is written in code."""
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(name.strip('_') or name)}(?![A-Za-z0-9])", sentence) is not None


def signature(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Return the function's `def` on one line: name, parameters and annotations."""
    keyword = "async def" if isinstance(function, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    return " ".join(f"{keyword} {function.name}({ast.unparse(function.args)}){returns}:".split())


def split_pairs(pairs: Iterable[Pair], root: Path, *, train: int, held_out: int) -> Split:
    """Split pairs by the hash of their package, so that no package is on both sides.

    Packages are held out in the order of their hashes until there are enough pairs; the others are trained on. Which
    pairs of a side are taken, and their order, follows from their hashes too: equal sources give equal splits.

    Raises:
        DemoError: There are too few pairs.
    """
    by_package: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        by_package[pair.package].append(pair)
    evaluated: list[Pair] = []
    trained: list[Pair] = []
    for package in sorted(by_package, key=digest):
        (evaluated if len(evaluated) < held_out else trained).extend(by_package[package])
    if len(trained) < train or len(evaluated) < held_out:
        msg = (
            f"The Python sources in {str(root)!r} give {len(trained)} pairs to train on and {len(evaluated)} to hold "
            f"out; the demo needs {train} and {held_out}. Run it with a Python whose standard library is there as .py "
            "files (not only compiled or zipped)."
        )
        raise DemoError(msg)
    return Split(tuple(sorted(trained, key=order)[:train]), tuple(sorted(evaluated, key=order)[:held_out]))


def order(pair: Pair) -> str:
    """A fixed order that has nothing to do with what a pair says."""
    return digest(f"{pair.module}\n{pair.line}\n{pair.sentence}")


def digest(text: str) -> str:
    """A hash that is the same in every process, unlike `hash`."""
    return hashlib.sha256(text.encode()).hexdigest()
