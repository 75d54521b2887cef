"""`tunerkit plugins`."""

from __future__ import annotations

import dataclasses
import json
import warnings
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from tunerkit.plugins import PluginInfo

_STYLES = {"loaded": "green", "broken": "red", "conflict": "red", "not allowed": "yellow"}


@click.command
@click.option("--json", "as_json", is_flag=True, help="Print plain data instead of a table.")
@click.option("--check", is_flag=True, help="Load every plugin; exit with 1 if one of them cannot be used.")
def plugins(*, as_json: bool, check: bool) -> None:
    """List the installed methods and how they stand.

    Nothing is imported without --check, so a method that is fine shows as "not loaded".
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

    table = Table("Method", "Package", "Version", "Status", "Why", box=None)
    for row in rows:
        name = row.method if row.kind == "method" else f"{row.method} ({row.kind})"
        cells = (name, row.package or "(registered)", row.version or "", row.status, row.reason)
        # As text, because square brackets in a reason would be taken for markup.
        table.add_row(*map(Text, cells), style=None if row.status == "not loaded" else _STYLES[row.status])
    Console().print(table)
