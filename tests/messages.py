"""Every message that tunerkit raises or warns with, from its source, and what the tests read of each.

`Recorder` is the pytest plugin behind `--messages`: it notes the messages of tunerkit's errors and warnings that tests
assert, and writes them to `docs/messages.md`. `sites` finds by reading the source where such messages are made.
"""

from __future__ import annotations

import ast
import builtins
import functools
import importlib
import inspect
import re
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest
from _pytest.raises import RaisesExc
from _pytest.recwarn import WarningsChecker

from tunerkit.errors import TunerkitError, TunerkitWarning

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "messages.md"
PACKAGES = [ROOT / "tunerkit", *sorted(ROOT.glob("plugins/*/tunerkit_*"))]

LONG = 400
"""How many characters an example has at most, if there is a shorter one."""

HEAD = """# Messages

What tunerkit raises and warns with. A message says what was found and what is possible, and ends with what to do.

To find one here, search for some of its words that are no name, path or number: those are an example's. The heading is
the class, all of which `tunerkit.errors` has but where another module is named, and by which a program catches it. The
table says where a message is made, and the test that reads it.

This page is written by the tests, and a test says when it is no longer right. To write it anew:

```sh
.venv/bin/tox -e messages
```

With test files after `--`, only what these read is.
"""


# Where messages are made


@dataclass(frozen=True)
class Site:
    """A place in the source that makes an error or a warning, and what is known of its message.

    `kind` is the name of its class; where a function is told which, `TunerkitError`. `pattern` matches its messages.
    """

    module: str
    function: str
    kind: str
    pattern: str
    lines: range

    def makes(self, row):
        return (
            (row.module, row.function) == (self.module, self.function)
            and self.kind in (row.kind, "TunerkitError")
            and re.fullmatch(self.pattern, row.text, re.DOTALL) is not None
        )


def module_name(path, package):
    return ".".join((package.name, *path.relative_to(package).with_suffix("").parts)).removesuffix(".__init__")


def sources():
    return {module_name(path, package): path for package in PACKAGES for path in sorted(package.rglob("*.py"))}


@functools.cache
def sites():
    """Return all places of the source that make an error or a warning of tunerkit's."""
    trees = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in sources().items()}
    kinds = kinds_in(trees.values())
    return [site for module, tree in trees.items() for site in sites_in(tree, module, kinds)]


def kinds_in(trees):
    """Return the names of the classes of tunerkit's errors and warnings."""
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    kinds, before = {"TunerkitError", "TunerkitWarning"}, set()
    while kinds != before:
        before = set(kinds)
        kinds |= {node.name for node in classes if any(last_name(base) in before for base in node.bases)}
    return kinds


def last_name(node):
    return ast.unparse(node).rpartition(".")[2]


def sites_in(tree, module, kinds, function=None, path=()):
    """Yield the sites of one module, going through its functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            inner = node if isinstance(node, ast.FunctionDef) else function
            yield from sites_in(node, module, kinds, inner, (*path, node.name))
            continue
        kind, message = made_by(node, kinds, function)
        if kind is not None:
            lines = range(node.lineno, node.end_lineno + 1)
            for pattern in templates(message, function, node.lineno):
                yield Site(module, ".".join(path), kind, pattern, lines)
        yield from sites_in(node, module, kinds, function, path)


def made_by(node, kinds, function):
    """Return the class and the message, if a node makes an error or a warning."""
    if not isinstance(node, ast.Call) or not node.args:
        return None, None
    name = last_name(node.func)
    if name in kinds:
        return name, node.args[0]
    if name == "warn" and len(node.args) > 1 and last_name(node.args[1]) in kinds:
        return last_name(node.args[1]), node.args[0]
    told = {} if function is None else {word.arg: word.annotation for word in function.args.args}
    if told.get(name) is not None and ast.unparse(told[name]) == "type[TunerkitError]":
        return "TunerkitError", node.args[0]
    return None, None


def templates(message, function, line):
    """Return a pattern for each text that a message at a line may have: of all values that its name may stand for."""
    if isinstance(message, ast.Name) and function is not None:
        return sorted({*values_of(message.id, function, line)}) or [".*"]
    return [template(message)]


def template(message):
    """Return a pattern of a message's text: what stands in the source as it is, anything for the rest."""
    match message:
        case ast.Constant(value=str(text)):
            return re.escape(plain(text))
        case ast.JoinedStr(values=parts):
            return "".join(map(template, parts))
        case _:
            return ".*"


def values_of(name, function, line):
    """Yield a pattern for each value that a message's name may have at a line: those given since it was last used."""
    nodes = [node for node in ast.walk(function) if getattr(node, "lineno", line) < line]
    uses = [node.lineno for node in nodes if is_use(node) and name in map(last_name, names_in(node))]
    given = [node for node in nodes if isinstance(node, (ast.Assign, ast.AugAssign)) and name in targets_of(node)]
    since = [node for node in given if node.lineno > max(uses, default=0)]
    if not since:
        since = sorted(given, key=lambda node: node.lineno)[-1:]
    more = ".*" if any(isinstance(node, ast.AugAssign) for node in since) else ""
    for node in since:
        if isinstance(node, ast.Assign):
            yield template(node.value) + more


def is_use(node):
    return isinstance(node, ast.Raise) or (isinstance(node, ast.Call) and last_name(node.func) == "warn")


def names_in(node):
    return [inner for inner in ast.walk(node) if isinstance(inner, ast.Name)]


def targets_of(node):
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [ast.unparse(target) for target in targets]


def plain(text):
    """Return a message in one line, as it stands in the table."""
    return re.sub(r"\s*\n\s*", " ", text)


# What the tests read


@dataclass(frozen=True)
class Row:
    """A message as it was printed, where it was made and the test that reads it."""

    kind: str
    text: str
    module: str
    function: str
    test: str

    def __str__(self):
        ticks = "``" if "`" in self.text else "`"
        pad = " " if ticks == "``" else ""
        text = f"{ticks}{pad}{self.text}{pad}{ticks}".replace("|", r"\|")
        return f"| {text} | `{self.module}` `{self.function}` | `{self.test}` |"


ROW = re.compile(
    r"\| (?P<ticks>`+)(?P<text>.+?)(?P=ticks) \| `(?P<module>\S+)` `(?P<function>\S+)` \| `(?P<test>\S+)` \|"
)


def rows_of(page):
    """Return what the tables of a page hold."""
    rows, kind = [], None
    for line in page.splitlines():
        if line.startswith("## "):
            kind = line.removeprefix("## ").strip()
        elif found := ROW.fullmatch(line):
            text = found["text"].replace(r"\|", "|")
            text = text[1:-1] if found["ticks"] == "``" else text
            rows.append(Row(kind, text, found["module"], found["function"], found["test"]))
    return rows


class Recorder:
    """Notes the messages that tests assert: caught by `pytest.raises` or `pytest.warns`, and then matched or read."""

    def __init__(self):
        self.sites = sites()
        self.heard = defaultdict(set)  # (module, line, class, test) -> texts
        self.made = []  # in this test
        self.ran = set()
        self.test = None
        self.folder = None
        self.patch = pytest.MonkeyPatch()

    # What pytest calls

    def pytest_sessionstart(self, session):
        self.folder = session.config._tmp_path_factory.getbasetemp()
        self.listen(self.patch)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        name = item.nodeid.partition("[")[0]
        self.ran.add(name)
        # What hypothesis draws is another example each time.
        self.made.clear()
        self.test = None if getattr(getattr(item, "obj", None), "is_hypothesis_test", False) else name
        try:
            return (yield)
        finally:
            self.test = None

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        heard, ran = node.workeroutput["messages"]
        self.heard |= {tuple(key): set(texts) for key, texts in heard}
        self.ran |= set(ran)

    def pytest_sessionfinish(self, session, exitstatus):
        self.patch.undo()
        if hasattr(session.config, "workeroutput"):
            heard = [[list(key), sorted(texts)] for key, texts in self.heard.items()]
            session.config.workeroutput["messages"] = heard, [*self.ran]
        elif exitstatus == 0:
            before = rows_of(PAGE.read_text(encoding="utf-8")) if PAGE.is_file() else []
            PAGE.write_text(written(self.rows(before)), encoding="utf-8")

    # How it hears

    def listen(self, patch):
        """Note from now on where messages are made, and which of them are asserted."""
        for base in (TunerkitError, TunerkitWarning):
            patch.setattr(base, "__init__", self.remembering(base), raising=False)
            patch.setattr(base, "__str__", self.heard_when_read(base.__str__), raising=False)
        leave_raises, leave_warns = RaisesExc.__exit__, WarningsChecker.__exit__

        def leave_raises_heard(context, kind, error, trace):
            caught = leave_raises(context, kind, error, trace)
            if caught:
                self.hear(error, context.match)
            return caught

        def leave_warns_heard(context, kind, error, trace):
            leave_warns(context, kind, error, trace)
            for warning in context:
                if context.matches(warning):
                    self.hear(warning.message, context.match_expr)

        patch.setattr(RaisesExc, "__exit__", leave_raises_heard)
        patch.setattr(WarningsChecker, "__exit__", leave_warns_heard)

    def remembering(self, base):
        """Return an `__init__` that notes the module and the line of its caller."""

        def remember(message, *args, **kwargs):
            super(base, message).__init__(*args, **kwargs)
            caller = sys._getframe(1)
            place = (caller.f_globals.get("__name__", ""), caller.f_lineno)
            # Not the message itself: it would keep alive what its traceback holds.
            self.made.append((place, type(message).__name__, str(args[0]) if args else ""))

        return remember

    def heard_when_read(self, read):
        def text_of(message):
            text = read(message)
            if message.__dict__.pop("asserted", False):
                self.hear(message, text)
            return text

        return text_of

    def hear(self, message, matched):
        """Note a message that a test has caught, at once if it was matched, or else when its text is asked for."""
        if self.test is None or not isinstance(message, (TunerkitError, TunerkitWarning)):
            return
        if matched is None:
            message.asserted = True
            return
        whole = str(message)
        for place, kind, text in self.made:
            # A message may quote another, as that of a method's package does of why it cannot be used.
            if text in whole:
                self.heard[(*place, kind, self.test)].add(self.without_accidents(text))

    def without_accidents(self, text):
        """Return a message without what differs from run to run: the folder of the tests, addresses, ports."""
        folders = [re.escape(str(folder)) for folder in (self.folder, Path(tempfile.gettempdir()))]
        within = rf"{folders[0]}/[^/'\"\s,;]+|{folders[1]}/{tempfile.gettempprefix()}\w+"
        text = re.sub(within, "/path/to", text).replace(str(ROOT), "/path/to/tunerkit")
        text = re.sub(r"(?<=//127\.0\.0\.1:)\d+", "8000", text)
        return plain(re.sub(r"\b0x[0-9a-f]{6,}", "0x...", text))

    # What it writes

    def rows(self, before):
        """Return a row for each message of each site, and those of before that no test of this run had to show."""
        heard = [
            (site, Row(kind, text, module, site.function, test))
            for (module, line, kind, test), texts in self.heard.items()
            for site in self.sites
            if site.module == module and line in site.lines
            for text in texts
        ]
        heard = [(site, row) for site, row in heard if site.makes(row)]
        kept = [row for row in before if row.test not in self.ran and is_known(row.test)]
        heard += [(site, row) for row in kept for site in self.sites if site.makes(row)]
        found = defaultdict(list)
        for site, row in heard:
            # Where the whole message comes from elsewhere it is one of several.
            found[site, row.kind, words_of(row.text) if site.pattern == ".*" else ""].append(row)
        return {min(rows, key=preference) for rows in found.values()}


def preference(row):
    """Sort examples: those of tests that stand where they run, of a length to be read, by their tests' names."""
    return not is_there(row.test), len(row.text) > LONG, row.test, len(row.text), row.text


def words_of(text):
    """Return the first words of a message that are no names, paths or numbers."""
    words = re.sub(r"'[^']*'|`[^`]*`|\([^)]*\)|[^A-Za-z ]", " ", text).split()
    return " ".join(words[:5])


def is_there(reference):
    """Say whether a file defines the test that a reference names, `file::test` or `file::Class::test`."""
    file, *names = reference.split("::")
    body = parsed(ROOT / file).body
    for name in names:
        found = [node for node in body if getattr(node, "name", None) == name]
        if not found:
            return False
        body = getattr(found[0], "body", [])
    return bool(names) and names[-1].startswith("test_")


def is_inherited(reference):
    """Say whether a class of tests has the test that a reference names from the kit for methods."""
    file, kind, name = reference.split("::")
    classes_there = [node for node in parsed(ROOT / file).body if isinstance(node, ast.ClassDef) and node.bases]
    kit = [parsed(path) for path in (ROOT / "tunerkit" / "testing").glob("*.py")]
    tests = {node.name for tree in kit for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    return kind in {node.name for node in classes_there} and name in tests


def is_known(reference):
    return is_there(reference) or (reference.count("::") == 2 and is_inherited(reference))


@functools.cache
def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])


def written(rows):
    """Return the page that has these rows."""
    parts = [HEAD]
    by_kind = defaultdict(list)
    for row in rows:
        by_kind[row.kind].append(row)
    kinds = classes()
    for name, found in sorted(by_kind.items()):
        parts += [
            f"\n## {name}\n\n{described(kinds[name])}\n\n",
            "| Message | Made in | Read by |\n| --- | --- | --- |\n",
        ]
        parts += [f"{row}\n" for row in sorted(found, key=order)]
    return "".join(parts)


def order(row):
    """Sort by the first words, whatever signs they stand in."""
    return re.sub(r"[^a-z ]", "", row.text.lower()).strip(), row.text, row.module, row.function


def classes():
    """Return the classes of tunerkit's errors and warnings by name."""
    for module in sources():
        if module.endswith(".errors"):
            importlib.import_module(module)
    found, queue = {}, [TunerkitError, TunerkitWarning]
    while queue:
        kind = queue.pop()
        found[kind.__name__] = kind
        queue += kind.__subclasses__()
    return found


def described(kind):
    """Return what is said of a class: when it is raised, and as which other classes it can be caught."""
    text = inspect.getdoc(kind).partition("\n\n")[0].replace("\n", " ")
    others = [base.__name__ for base in kind.__mro__[1:] if base not in (Exception, BaseException, object)]
    own = [name for name in others if not hasattr(builtins, name) and name not in ("TunerkitError", "TunerkitWarning")]
    also = own + [name for name in others if hasattr(builtins, name)]
    place = "" if kind.__module__ == "tunerkit.errors" else f" It is in `{kind.__module__}`."
    return f"{text}{place} It is also a {listed(also)}." if also else f"{text}{place}"


def listed(names):
    quoted = [f"`{name}`" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"
