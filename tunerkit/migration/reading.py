"""What a script imports of PEFT and where it uses it."""

from __future__ import annotations

import ast
import re
import warnings
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import libcst as cst
from libcst import metadata
from libcst.helpers import get_full_name_for_node, get_full_name_for_node_or_raise

from tunerkit.migration.names import Entry, find, find_path, modules

Importing: TypeAlias = "cst.Import | cst.ImportFrom"

_PATH = re.compile(r"(?<![\w./-])peft\.[A-Za-z_][\w.]*|\Apeft\.?\Z")
_LONG = 60
_ASKS = "is_peft_available"


class Finding(NamedTuple):
    """What a person has to look at.

    Attributes:
        line: Where it is.
        what: What stands there.
        why: Why it was left as it is.
    """

    line: int
    what: str
    why: str


@dataclass
class Use:
    """What the script reads of a module that a statement imports.

    Attributes:
        path: PEFT's module.
        places: The modules of tunerkit that have it now.
        stays: Whether something of it is not there, so that the import stays.
    """

    path: str
    places: set[str] = field(default_factory=set)
    stays: bool = False


@dataclass
class Script:
    """A module's tree, and what was found in it.

    Attributes:
        tree: The tree.
        uses: For each statement that imports PEFT's modules, and the name that each gets, what is read of it.
        attributes: The expressions that name a thing of PEFT's through a module, and what is known of each.
        taken: All names that the script gives to anything but modules of tunerkit's.
        findings: What a person has to look at.
    """

    tree: cst.Module
    uses: dict[Importing, dict[str, Use]] = field(default_factory=dict)
    attributes: dict[cst.BaseExpression, Entry] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    findings: list[Finding] = field(default_factory=list)


def read(source: bytes) -> Script:
    """Find what a script imports of PEFT and how it uses it.

    Raises:
        SyntaxError: The source is no Python.
        RecursionError: It is nested too deeply.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # the script's own matter
        warnings.simplefilter("ignore", DeprecationWarning)  # what some of these were before Python 3.12
        wrapper = metadata.MetadataWrapper(_parse(source))
        script = Script(wrapper.module)
        wrapper.visit(_Reader(script))
    script.findings.sort()
    return script


def _parse(source: bytes) -> cst.Module:
    try:
        ast.parse(source)  # it says more clearly what is wrong, and libcst ends the process for want of stack
        return cst.parse_module(source)
    except (ValueError, cst.ParserSyntaxError) as error:
        raise SyntaxError(str(error)) from error


def name_of(alias: cst.ImportAlias) -> str:
    """Return the dotted name that is imported."""
    return get_full_name_for_node_or_raise(alias.name)


def name_after_as(alias: cst.ImportAlias) -> str | None:
    """Return the name that what is imported gets by `as`; None without one."""
    return None if alias.asname is None else get_full_name_for_node_or_raise(alias.asname.name)


def is_peft(name: str) -> bool:
    """Return whether a dotted name begins with PEFT's package."""
    return name.partition(".")[0] == "peft"


def module_of(statement: cst.ImportFrom) -> str | None:
    """Return the module of PEFT's that names are imported from; None for others."""
    if statement.relative or statement.module is None:
        return None
    name = get_full_name_for_node_or_raise(statement.module)
    return name if is_peft(name) else None


class _Reader(cst.CSTVisitor):
    METADATA_DEPENDENCIES = (
        metadata.ExpressionContextProvider,
        metadata.ParentNodeProvider,
        metadata.PositionProvider,
        metadata.ScopeProvider,
    )

    def __init__(self, script: Script) -> None:
        super().__init__()
        self.script = script
        self.scopes: dict[metadata.Scope, None] = {}

    # What stands in the tree

    def on_visit(self, node: cst.CSTNode) -> bool:
        scope = self.get_metadata(metadata.ScopeProvider, node, None)
        if scope is not None:
            self.scopes[scope] = None
        return super().on_visit(node)

    def visit_Import(self, node: cst.Import) -> None:
        aliases = [(name_of(alias), name_after_as(alias)) for alias in node.names]
        uses = {given or "peft": Use(name if given else "peft") for name, given in aliases if is_peft(name)}
        if uses:
            self.script.uses[node] = uses

    def visit_ImportFrom(self, node: cst.ImportFrom) -> None:
        module = module_of(node)
        if module is None:
            return
        if isinstance(node.names, cst.ImportStar):
            self.find(node, f"from {module} import *", "it does not say which names are used: name them")
            return
        uses = self.script.uses[node] = {}
        for alias in node.names:
            name = name_of(alias)
            path, entry = f"{module}.{name}", find(module, name)
            if path in modules():
                uses[name_after_as(alias) or name] = Use(path)
            elif entry.reason:
                self.find(alias, path, entry.reason)

    def visit_SimpleString(self, node: cst.SimpleString) -> None:
        text = node.evaluated_value
        is_prose = isinstance(self.get_metadata(metadata.ParentNodeProvider, node), cst.Expr)
        if isinstance(text, str) and not is_prose:
            self.find_in(node, text, node.value)

    def visit_FormattedStringText(self, node: cst.FormattedStringText) -> None:
        self.find_in(node, node.value, node.value)

    def find_in(self, node: cst.CSTNode, text: str, written: str) -> None:
        """Note a text in which something of PEFT's is named as in code."""
        if path := _PATH.search(text):
            is_short = len(written) <= _LONG and "\n" not in written
            what = written if is_short else f"... {path[0]} ..."
            self.find(node, what, "a text that may mean a module or a name of PEFT's")

    def visit_Call(self, node: cst.Call) -> None:
        called = get_full_name_for_node(node.func) or ""
        if called.rpartition(".")[2] == _ASKS:
            self.find(node, f"{called}()", "it asks whether PEFT is installed, and not tunerkit")

    # What is read of the modules that are imported

    def leave_Module(self, original_node: cst.Module) -> None:  # noqa: ARG002 - libcst's signature
        """Note every use of a module of PEFT's, and then the imports that nothing uses."""
        for scope in self.scopes:
            self.script.taken.update(one.name.partition(".")[0] for one in scope.assignments if not _is_ours(one))
            for access in scope.accesses:
                if isinstance(access.node, (cst.Name, cst.Attribute)):
                    self.follow_access(access)
        for statement, uses in self.script.uses.items():
            for use in uses.values():
                if not (use.places or use.stays):
                    use.stays = True
                    self.find(statement, use.path, "it is imported, and nothing of it is used by name here")

    def follow_access(self, access: metadata.Access) -> None:
        """Note a use, if it is one of a module of PEFT's."""
        chain = self.chain(access.node)
        name = cst.ensure_type(chain[0], cst.Name).value
        given = {one.node for one in access.scope[name] if isinstance(one, metadata.Assignment)}
        owners = {node: use for node in given if (use := self.use_of(node, name)) is not None}
        if not owners:
            return
        if len({use.path for use in owners.values()}) > 1 or not all(map(self.is_none, given - owners.keys())):
            place = None
            self.find(chain[0], name, "it is imported, and is also something else")
        else:
            place = self.place(chain, next(iter(owners.values())).path)
        for use in owners.values():
            if place is None:
                use.stays = True
            else:
                use.places.add(place)

    def place(self, chain: list[cst.BaseExpression], path: str) -> str | None:
        """Return where in tunerkit is what an expression names, if it may be replaced."""
        above = path.split(".")
        parts = [*above, *(node.attr.value for node in chain if isinstance(node, cst.Attribute))]
        count, entry = find_path(parts)
        named = chain[max(count - len(above), 0)]
        context = self.get_metadata(metadata.ExpressionContextProvider, named)
        why = entry.reason if entry is not None else "the module is used as a whole"
        if not why and context is not metadata.ExpressionContext.LOAD:
            why = "it is set or deleted in PEFT's module"
        if entry is None or why:
            self.find(named, ".".join(parts[:count]), why)
            return None
        self.script.attributes[named] = entry
        return entry.place

    def chain(self, node: cst.BaseExpression) -> list[cst.BaseExpression]:
        """Return the expressions `a`, `a.b`, `a.b.c` that a name begins, from the shortest to the longest."""
        while isinstance(node, cst.Attribute):
            node = node.value
        chain = [node]
        while isinstance(above := self.get_metadata(metadata.ParentNodeProvider, node), cst.Attribute):
            chain.append(above)
            node = above
        return chain

    def use_of(self, node: cst.CSTNode, name: str) -> Use | None:
        """Return the use of what a statement imports under a name, if it is a module of PEFT's."""
        if not isinstance(node, (cst.Import, cst.ImportFrom)):
            return None
        return self.script.uses.get(node, {}).get(name)

    def is_none(self, node: cst.CSTNode) -> bool:
        """Return whether a name is set to None or False, which says that a module is not there."""
        target = self.get_metadata(metadata.ParentNodeProvider, node)
        assigned = self.get_metadata(metadata.ParentNodeProvider, target, None)
        return isinstance(assigned, cst.Assign) and get_full_name_for_node(assigned.value) in {"None", "False"}

    def find(self, node: cst.CSTNode, what: str, why: str) -> None:
        """Note what a person has to look at."""
        finding = Finding(self.get_metadata(metadata.PositionProvider, node).start.line, what, why)
        if finding not in self.script.findings:
            self.script.findings.append(finding)


def _is_ours(assignment: metadata.BaseAssignment) -> bool:
    """Return whether a name is that of one of tunerkit's modules, imported under its own name."""
    if not (isinstance(assignment, metadata.Assignment) and isinstance(assignment.node, cst.Import)):
        return False
    plain = {name_of(alias) for alias in assignment.node.names if alias.asname is None}
    return any(name == assignment.name or name.startswith(f"{assignment.name}.") for name in plain)
