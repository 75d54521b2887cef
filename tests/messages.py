"""Every message that tunerkit raises or warns with, from its source, and what the tests read of each.

`Recorder` is the pytest plugin behind `--messages`: it notes the messages of tunerkit's errors and warnings that tests
assert, and writes them to `docs/messages.md`. `sites` finds by reading the source where such messages are made.
"""

from __future__ import annotations

import ast
import builtins
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
            yield Site(module, ".".join(path), kind, template(message, function, node.lineno), lines)
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


def template(message, function, line):
    """Return a pattern of a message's text: what stands in the source as it is, anything for the rest."""
    if isinstance(message, ast.Name) and function is not None:
        values = [
            node.value
            for node in ast.walk(function)
            if isinstance(node, ast.Assign) and node.lineno <= line and ast.unparse(node.targets[0]) == message.id
        ]
        message = max(values, key=lambda value: value.lineno, default=message)
    match message:
        case ast.Constant(value=str(text)):
            return re.escape(plain(text))
        case ast.JoinedStr(values=parts):
            return "".join(template(part, None, line) for part in parts)
        case _:
            return ".*"


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
        pad = " " if ticks == "``" or self.text != self.text.strip() else ""
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
        self.heard = {}  # (module, line, class, test) -> the first text
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
        self.test = None if getattr(getattr(item, "obj", None), "is_hypothesis_test", False) else name
        try:
            return (yield)
        finally:
            self.test = None

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        heard, ran = node.workeroutput["messages"]
        self.heard |= {tuple(key): text for key, text in heard}
        self.ran |= set(ran)

    def pytest_sessionfinish(self, session, exitstatus):
        self.patch.undo()
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["messages"] = [[list(key), text] for key, text in self.heard.items()], [*self.ran]
        elif exitstatus == 0:
            before = rows_of(PAGE.read_text(encoding="utf-8")) if PAGE.is_file() else []
            PAGE.write_text(written(self.rows(before)), encoding="utf-8")

    # How it hears

    def listen(self, patch):
        """Note from now on where messages are made, and which of them are asserted."""
        for base in (TunerkitError, TunerkitWarning):
            patch.setattr(base, "__init__", remember_place(base), raising=False)
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

    def heard_when_read(self, read):
        def text_of(message):
            text = read(message)
            if message.__dict__.pop("asserted", False):
                self.hear(message, text)
            return text

        return text_of

    def hear(self, message, matched):
        """Note a message that a test has caught, at once if it was matched, or else when its text is asked for."""
        if self.test is None or not hasattr(message, "made_at"):
            return
        if matched is None:
            message.asserted = True
            return
        key = (*message.made_at, type(message).__name__, self.test)
        text = self.without_accidents(str(message))
        if key not in self.heard or len(self.heard[key]) > LONG >= len(text):
            self.heard[key] = text

    def without_accidents(self, text):
        """Return a message without what differs from run to run: the folder of the tests, addresses."""
        within = re.escape(str(self.folder)) + r"/[^/'\"\s,;]+|" + re.escape(tempfile.gettempdir()) + r"/tmp\w+"
        text = re.sub(within, "/path/to", text).replace(str(ROOT), "/path/to/tunerkit")
        return plain(re.sub(r"\b0x[0-9a-f]{6,}", "0x...", text))

    # What it writes

    def rows(self, before):
        """Return a row for each site that was heard of, and those of before that no test of this run had to show."""
        found = defaultdict(list)
        known = sites()
        for (module, line, kind, test), text in self.heard.items():
            for site in known:
                if site.module == module and line in site.lines and site.kind in (kind, "TunerkitError"):
                    found[site, kind].append(Row(kind, text, module, site.function, test))
        for row in before:
            if row.test not in self.ran and is_there(row.test):
                for site in known:
                    if site.makes(row):
                        found[site, row.kind].append(row)
        return {min(rows, key=lambda row: (len(row.text) > LONG, row.test)) for rows in found.values()}


def remember_place(base):
    """Return an `__init__` that notes the module and the line of its caller."""

    def remember(message, *args, **kwargs):
        super(base, message).__init__(*args, **kwargs)
        caller = sys._getframe(1)
        message.made_at = (caller.f_globals.get("__name__", ""), caller.f_lineno)

    return remember


def is_there(reference):
    """Say whether a file defines the test that a reference names, `file::test` or `file::Class::test`."""
    file, *names = reference.split("::")
    path = ROOT / file
    if not names or not path.is_file():
        return False
    body = ast.parse(path.read_text(encoding="utf-8")).body
    for name in names:
        found = [node for node in body if getattr(node, "name", None) == name]
        if not found:
            return False
        body = getattr(found[0], "body", [])
    return names[-1].startswith("test_")


def written(rows):
    """Return the page that has these rows."""
    parts = [HEAD]
    by_kind = defaultdict(list)
    for row in rows:
        by_kind[row.kind].append(row)
    kinds = classes()
    for name, found in sorted(by_kind.items()):
        parts += [f"\n## {name}\n", f"\n{described(kinds[name])}\n", "\n| Message | Made in | Read by |\n| --- | --- | --- |\n"]
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
