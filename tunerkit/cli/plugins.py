"""`tunerkit plugins`."""

from __future__ import annotations

import dataclasses
import json
import warnings
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from tunerkit.plugins import Absence, PluginInfo

_OPTIONAL = ("Adapts", "Why")
"""Columns that are left out where they say nothing."""
_STYLES = {"loaded": "green", "broken": "red", "conflict": "red", "not allowed": "yellow"}


@click.command
@click.option("--json", "as_json", is_flag=True, help="Print plain data instead of a table.")
@click.option("--check", is_flag=True, help="Load every plugin; exit with 1 if one of them cannot be used.")
def plugins(*, as_json: bool, check: bool) -> None:
    """List the installed methods and how they stand.

    Nothing is imported without --check, so a method that is fine shows as "not loaded". Of a method that is loaded the
    list also tells which kinds of layers it adapts, and what its adapters cannot do, as it declares it.
    """
    from tunerkit.plugins import installed, load_all  # noqa: PLC0415 - keeps --help quick

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = load_all() if check else installed()
    for warning in caught:
        click.echo(f"Warning: {warning.message}", err=True)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
    elif rows:
        _print_table(rows)
    else:
        click.echo("No methods are installed. From a checkout: pip install ./plugins/tunerkit-<method>")
    if check and any(row.status in ("broken", "conflict") for row in rows):
        raise SystemExit(1)


def _print_table(rows: list[PluginInfo]) -> None:
    from rich.console import Console  # noqa: PLC0415 - slow, and --json needs none of it
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    lines = [_cells(row) for row in rows]
    # Few terminals are wide.
    headers = [name for name in lines[0] if name not in _OPTIONAL or any(line[name] for line in lines)]
    table = Table(*headers, box=None)
    for row, line in zip(rows, lines, strict=True):
        # As text, because square brackets in a reason would be taken for markup.
        cells = [Text(line[name]) for name in headers]
        table.add_row(*cells, style=None if row.status == "not loaded" else _STYLES[row.status])
    Console().print(table)
    told = [_in_words(row, absence) for row in rows if row.capabilities for absence in row.capabilities.absent]
    if told:
        click.echo("\n" + "\n".join(told))


def _cells(row: PluginInfo) -> dict[str, str]:
    """Return what the table says of a plugin, by column."""
    can = row.capabilities
    return {
        "Method": row.method if row.kind == "method" else f"{row.method} ({row.kind})",
        "Package": row.package or "(registered)",
        "Version": row.version or "",
        "Status": row.status,
        "Adapts": "" if can is None else ", ".join(can.kinds) or "its own layers",
        "Why": row.reason,
    }


def _in_words(row: PluginInfo, absence: Absence) -> str:
    what = "have adapters of their own for rows of a batch" if absence.what == "rows" else absence.what
    return f"{row.method} cannot {what}: {absence.why} ({', '.join(absence.classes)})."
