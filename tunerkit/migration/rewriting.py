"""The rewriting of what imports PEFT; all else of a script stays to the letter, its comments too."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

import libcst as cst

from tunerkit.migration.names import Entry, find
from tunerkit.migration.reading import Finding, Script, Use, module_of, name_after_as, name_of, read
from tunerkit.migration.splitting import dotted, is_for_tools, split

if TYPE_CHECKING:
    from collections.abc import Sequence


class Migrated(NamedTuple):
    """A script for tunerkit.

    Attributes:
        source: Its text.
        findings: What a person has to look at; the lines are those of the script for PEFT.
    """

    source: bytes
    findings: list[Finding]


def migrate(source: bytes) -> Migrated:
    """Rewrite a script for PEFT.

    What is in tunerkit is imported from there. What is not stays, and is among the findings with the reason, as is all
    that only a person can judge.

    Raises:
        SyntaxError: The source is no Python, or is nested too deeply.
    """
    if b"peft" not in source:
        return Migrated(source, [])
    try:
        script = read(source)
        tree = script.tree.visit(_Rewriter(script))
    except (MemoryError, RecursionError) as error:
        msg = "it is nested too deeply"
        raise SyntaxError(msg) from error
    return Migrated(tree.bytes, script.findings)


class _Rewriter(cst.CSTTransformer):
    def __init__(self, script: Script) -> None:
        super().__init__()
        self.script = script

    def bound(self, place: str) -> str:
        """Return the name by which a module of tunerkit's is known in the script."""
        name = place
        if place.partition(".")[0] in self.script.taken:
            name = place.replace(".", "_")
            while name in self.script.taken:
                name += "_"
        return name

    # What uses a name

    def leave_Attribute(self, original_node: cst.Attribute, updated_node: cst.Attribute) -> cst.Attribute:
        entry = self.script.attributes.get(original_node)
        if entry is None:
            return updated_node
        named = cst.Attribute(dotted(self.bound(entry.place)), cst.Name(entry.now))
        return named.with_changes(lpar=updated_node.lpar, rpar=updated_node.rpar)

    # What imports it

    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> cst.SimpleStatementLine | cst.FlattenSentinel[cst.SimpleStatementLine]:
        if len(original_node.body) > 1:
            return updated_node.with_changes(body=self.joined(original_node.body, updated_node.body))
        first, *others = self.statements(original_node.body[0], updated_node.body[0])
        end = updated_node.trailing_whitespace
        if not is_for_tools(end.comment):
            end = cst.TrailingWhitespace(newline=end.newline)
        lines = [cst.SimpleStatementLine([statement], trailing_whitespace=end) for statement in others]
        return cst.FlattenSentinel([updated_node.with_changes(body=[first]), *lines])

    def leave_SimpleStatementSuite(
        self, original_node: cst.SimpleStatementSuite, updated_node: cst.SimpleStatementSuite
    ) -> cst.SimpleStatementSuite:
        return updated_node.with_changes(body=self.joined(original_node.body, updated_node.body))

    def joined(
        self, original: Sequence[cst.BaseSmallStatement], updated: Sequence[cst.BaseSmallStatement]
    ) -> list[cst.BaseSmallStatement]:
        """Return the small statements of one line."""
        semicolon = cst.Semicolon(whitespace_after=cst.SimpleWhitespace(" "))
        made: list[cst.BaseSmallStatement] = []
        for before, now in zip(original, updated, strict=True):
            *others, last = self.statements(before, now)
            made.extend(statement.with_changes(semicolon=semicolon) for statement in others)
            made.append(last.with_changes(semicolon=now.semicolon))
        return made

    def statements(self, before: cst.BaseSmallStatement, now: cst.BaseSmallStatement) -> list[cst.BaseSmallStatement]:
        """Return what a statement becomes."""
        if not isinstance(before, (cst.Import, cst.ImportFrom)) or before not in self.script.uses:
            return [now]
        uses = self.script.uses[before]
        kept = self.of_modules(before, uses) if isinstance(before, cst.Import) else self.of_names(before, uses)
        places = sorted({place for use in uses.values() for place in use.places})
        return [*kept, *(cst.Import([self.import_of(place)]) for place in places)]

    def import_of(self, place: str) -> cst.ImportAlias:
        name = self.bound(place)
        asname = None if name == place else _as(name)
        return cst.ImportAlias(dotted(place), asname)

    @staticmethod
    def of_modules(statement: cst.Import, uses: dict[str, Use]) -> list[cst.BaseSmallStatement]:
        """Return what stays of `import ...`."""
        kept = [alias for alias in statement.names if _stays(alias, uses)]
        if not kept:
            return []
        kept[-1] = kept[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)
        return [statement.with_changes(names=kept)]

    @staticmethod
    def of_names(statement: cst.ImportFrom, uses: dict[str, Use]) -> list[cst.BaseSmallStatement]:
        """Return what `from ... import ...` becomes, but for the modules that it imports."""
        module = cast("str", module_of(statement))
        aliases = cast("Sequence[cst.ImportAlias]", statement.names)
        entries = [find(module, name_of(alias)) for alias in aliases]
        parts: dict[str, list[int]] = {}
        for position, (alias, entry) in enumerate(zip(aliases, entries, strict=True)):
            use = uses.get(name_after_as(alias) or name_of(alias))
            if use is None or use.stays:
                parts.setdefault(entry.place or module, []).append(position)
        names = [_renamed(alias, entry) for alias, entry in zip(aliases, entries, strict=True)]
        if len(parts) == 1 and len(names) == sum(map(len, parts.values())):  # only the module changes
            return [statement.with_changes(module=dotted(next(iter(parts))), names=names)]
        return [*split(statement, parts, names)]


def _stays(alias: cst.ImportAlias, uses: dict[str, Use]) -> bool:
    name = name_of(alias)
    return name.partition(".")[0] != "peft" or uses[name_after_as(alias) or "peft"].stays


def _renamed(alias: cst.ImportAlias, entry: Entry) -> cst.ImportAlias:
    if not entry.place or entry.now == entry.name:
        return alias
    return alias.with_changes(name=cst.Name(entry.now), asname=alias.asname or _as(entry.name))


def _as(name: str) -> cst.AsName:
    return cst.AsName(cst.Name(name))
