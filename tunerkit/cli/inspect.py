"""`tunerkit inspect`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tunerkit.offline.inspection import BaseMatch, Inspection

_FOLDER = click.Path(path_type=Path)
_STYLES = {"found": "green", **dict.fromkeys(("missing", "shape mismatch", "incomplete", "no place"), "red")}
_NOTES = 4
"""How many notes on targets that do not fit are shown unless all are asked for."""


class InspectFailure(click.ClickException):
    """There is nothing to inspect."""

    exit_code = 2


@click.command
@click.argument("checkpoint", type=_FOLDER)
@click.option("--base", type=_FOLDER, help="A transformers model's folder to match the checkpoint with.")
@click.option("--all", "show_all", is_flag=True, help="Show all settings, and every tensor and module by itself.")
@click.option("--json", "as_json", is_flag=True, help="Print plain data instead of tables.")
def inspect(*, checkpoint: Path, base: Path | None, show_all: bool, as_json: bool) -> None:
    """Say what an adapter's CHECKPOINT holds: its method, settings and tensors, and what they adapt.

    Only the config and the header of the tensors' file are read, so a large checkpoint takes no longer than a small
    one, and the method need not be installed. With --base the checkpoint is matched with a model, of which only the
    config is read; that needs the extra: pip install 'tunerkit[merge]'

    \b
    Exit status:
      0  the checkpoint could be read and, with --base, fits the model
      1  it does not fit the model
      2  the checkpoint or the model's config cannot be read
    """  # noqa: D301 - click reads \b
    from rich.console import Console  # noqa: PLC0415 - slow; keeps --help quick

    from tunerkit.errors import TunerkitError  # noqa: PLC0415
    from tunerkit.offline.inspection import inspect_checkpoint  # noqa: PLC0415

    try:
        with Console(stderr=True).status("Reading ..."):
            found = inspect_checkpoint(checkpoint, base)
    except TunerkitError as error:
        raise InspectFailure(str(error)) from error
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=2))
    else:
        _show(found, show_all=show_all)
    if found.base is not None and not found.base.fits:
        raise SystemExit(1)


def _show(found: Inspection, *, show_all: bool) -> None:
    method = found.method
    package = " ".join(text for text in (method.package, method.version) if text)
    click.echo(f"Checkpoint {found.checkpoint}")
    click.echo(f"Method     {method.peft_type}{f' ({package})' if package else ''}")
    if method.problem:
        click.echo(f"           {method.problem}")
    settings = found.settings if show_all else found.changed
    others = len(found.settings) - len(settings)
    heading = "All settings" if show_all else f"Settings away from their defaults ({others} others: --all)"
    _table(heading, ("setting", "value"), ((key, json.dumps(value)) for key, value in settings.items()))
    _table(
        "What the keys say it adapts",
        ("module", "tensors", "count"),
        (
            (
                item.module or "(the whole model)",
                ", ".join(item.holds) + (" (replaced)" if item.replaces else ""),
                str(item.count),
            )
            for item in found.adapted
        ),
    )
    tensors = ((item.key, " x ".join(map(str, item.shape)), item.dtype, f"{item.bytes:,}") for item in found.tensors)
    _table("Tensors", ("key", "shape", "dtype", "bytes", "count"), _counted(tensors, show_all=show_all))
    click.echo(f"{len(found.tensors)} tensors, {found.count:,} numbers, {found.bytes:,} bytes")
    if found.metadata:
        _table("Metadata", ("name", "text"), sorted(found.metadata.items()))
    if found.base is not None:
        _show_base(found.base, show_all=show_all)


def _show_base(base: BaseMatch, *, show_all: bool) -> None:
    targets = ((item["path"], item["status"]) for item in base.targets)
    _table(f"In {base.folder} ({base.model})", ("module", "status", "count"), _counted(targets, show_all=show_all))
    notes = [f"  {item['path']}: {item['note']}" for item in base.targets if item["note"]]
    for note in notes if show_all else notes[:_NOTES]:
        click.echo(note)
    found = sum(item["status"] == "found" for item in base.targets)
    click.echo(f"{found} of {len(base.targets)} targets found: {'it fits' if base.fits else 'it does not fit'}")
    if base.problem:
        click.echo(base.problem)
    if base.doubt:
        click.echo(base.doubt)


def _counted(rows: Iterable[tuple[str, ...]], *, show_all: bool) -> list[tuple[str, ...]]:
    """Put rows into one whose first cells, paths, differ in their numbers only, and add how many they are."""
    from tunerkit.offline.keys import by_number  # noqa: PLC0415 - keeps --help quick

    counts = Counter((path if show_all else by_number(path), *others) for path, *others in rows)
    return [(*row, str(count)) for row, count in counts.items()]


def _table(heading: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.console import Console  # noqa: PLC0415 - slow, and --json needs none of it
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=None, header_style="dim")
    for column in columns:
        # A key that is cut could not be copied, nor told from another.
        table.add_column(column, overflow="fold")
    for row in rows:
        # As text, because square brackets in a value would be taken for markup.
        table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    console = Console(highlight=False)
    console.print(Text(f"\n{heading}", style="bold"))
    console.print(table)
