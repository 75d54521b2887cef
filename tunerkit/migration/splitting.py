"""One `from ... import` made several, each name with its comments."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple, cast

import libcst as cst

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_FOR_TOOLS = re.compile(r"#\s*(noqa|type:|fmt:|isort:|nosec|pragma:|pylint:|pyright:|ruff:)")


def dotted(path: str) -> cst.Attribute | cst.Name:
    """Return the expression that a dotted path is."""
    return cast("cst.Attribute | cst.Name", cst.parse_expression(path))


def is_for_tools(comment: cst.Comment | None) -> bool:
    """Return whether a comment tells a tool how to treat its line; it belongs to every line made of that one."""
    return comment is not None and _FOR_TOOLS.match(comment.value) is not None


class _Item(NamedTuple):
    """A name with the comments around it: those in lines of their own above it, and the one behind it."""

    alias: cst.ImportAlias
    above: Sequence[cst.EmptyLine]
    behind: cst.Comment | None


def split(
    statement: cst.ImportFrom, parts: Mapping[str, Iterable[int]], names: Sequence[cst.ImportAlias]
) -> list[cst.ImportFrom]:
    """Return statements that import some of the names each.

    What was in several lines stays so, unless it is one name without a comment.

    Args:
        statement: The statement that imports all names.
        parts: The modules to import from, and the positions of the names.
        names: The names, as they are to be written.
    """
    spaces = _spaces(statement)
    has_lines = any(isinstance(space, cst.ParenthesizedWhitespace) for space in spaces)
    start, *between = [_comments(space) for space in spaces]
    items = [
        _Item(alias, above, behind)
        for alias, (_, above), (behind, _) in zip(names, [start, *between], between, strict=False)
    ]
    made = []
    for number, (module, positions) in enumerate(parts.items()):
        chosen = [items[position] for position in positions]
        first = start[0] if number == 0 or is_for_tools(start[0]) else None
        end = between[-1][1] if chosen[-1] is items[-1] else ()
        commented = first or end or any(item.above or item.behind for item in chosen)
        bare = statement.with_changes(module=dotted(module))
        if has_lines and (commented or len(chosen) > 1):
            made.append(_in_lines(bare, chosen, first, end))
        else:
            made.append(_in_one_line(bare, chosen))
    return made


def _spaces(statement: cst.ImportFrom) -> list[cst.BaseParenthesizableWhitespace]:
    """Return what stands before, between and after the names."""
    spaces = [statement.lpar.whitespace_after if statement.lpar else cst.SimpleWhitespace("")]
    for alias in cast("Sequence[cst.ImportAlias]", statement.names):
        if isinstance(alias.comma, cst.Comma):
            before, after = alias.comma.whitespace_before, alias.comma.whitespace_after
            spaces.append(before if any(_comments(before)) else after)
        else:
            spaces.append(statement.rpar.whitespace_before if statement.rpar else cst.SimpleWhitespace(""))
    return spaces


def _comments(space: cst.BaseParenthesizableWhitespace) -> tuple[cst.Comment | None, Sequence[cst.EmptyLine]]:
    """Return the comment that ends the line, and the lines of comments below it."""
    if not isinstance(space, cst.ParenthesizedWhitespace):
        return None, ()
    return space.first_line.comment, [line for line in space.empty_lines if line.comment]


def _in_one_line(statement: cst.ImportFrom, items: Sequence[_Item]) -> cst.ImportFrom:
    comma = cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
    names = [item.alias.with_changes(comma=comma) for item in items]
    names[-1] = names[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)
    space = cst.SimpleWhitespace(" ")
    return statement.with_changes(names=names, lpar=None, rpar=None, whitespace_after_import=space)


def _in_lines(
    statement: cst.ImportFrom, items: Sequence[_Item], start: cst.Comment | None, end: Sequence[cst.EmptyLine]
) -> cst.ImportFrom:
    below = [*(item.above for item in items), end]
    breaks = [
        cst.ParenthesizedWhitespace(
            first_line=cst.TrailingWhitespace(cst.SimpleWhitespace("  " if comment else ""), comment),
            empty_lines=lines,
            indent=True,
            last_line=cst.SimpleWhitespace("    " if number < len(items) else ""),
        )
        for number, (comment, lines) in enumerate(zip([start, *(item.behind for item in items)], below, strict=True))
    ]
    return statement.with_changes(
        names=[
            item.alias.with_changes(comma=cst.Comma(whitespace_after=space))
            for item, space in zip(items, breaks[1:], strict=True)
        ],
        lpar=cst.LeftParen(whitespace_after=breaks[0]),
        rpar=cst.RightParen(),
    )
