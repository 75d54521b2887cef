"""`tunerkit merge`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tunerkit.offline.merging import MergeReport

_FOLDER = click.Path(path_type=Path)


@click.command
@click.option("--base", type=_FOLDER, required=True, help="The base model: a transformers folder in safetensors.")
@click.option("--adapter", type=_FOLDER, required=True, help="The adapter's checkpoint.")
@click.option("--out", type=_FOLDER, required=True, help="The folder to write.")
@click.option("--overwrite", is_flag=True, help="Replace what is at --out, once the new folder is complete.")
@click.option("--json", "as_json", is_flag=True, help="Print plain data instead of text.")
def merge(*, base: Path, adapter: Path, out: Path, overwrite: bool, as_json: bool) -> None:
    """Fold an adapter into the model it was made for, and write that as a folder that transformers loads.

    The model is never held in memory: its files are read and written layer by layer, under the same names and keys and
    in the same dtypes. The new folder appears whole or not at all. Needs the extra: pip install 'tunerkit[merge]'

    Where the adapter changes one of two tied embeddings, both are written and the config says that they differ. A
    module that the adapter trained as a whole (modules_to_save) takes the place of the base's.
    """
    from tunerkit.offline.merging import merge_folder  # noqa: PLC0415 - keeps --help quick

    with _progress() as on_bytes:
        report = merge_folder(base, adapter, out, overwrite=overwrite, on_bytes=on_bytes)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report), indent=2))
    else:
        _tell(report)


def _tell(report: MergeReport) -> None:
    click.echo(f"Merged {report.adapter} ({report.method}) into {report.base} ({report.model}).")
    replaced = f", {len(report.replaced)} replaced" if report.replaced else ""
    click.echo(f"  {len(report.merged)} tensors merged{replaced}, {report.untouched} untouched")
    for key in report.untied:
        click.echo(f"  {key} was tied to another tensor and now has values of its own; the config says so")
    for name in report.left_out:
        click.echo(f"  {name} was left out: the adapter is not in it")
    click.echo(f"Wrote {report.bytes / 1e6:,.1f} MB to {report.out} in {report.seconds:.1f} s")


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Show on the standard error how much is written, if that is a terminal."""
    from rich.console import Console  # noqa: PLC0415 - slow
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("reading the adapter", total=None)
        yield lambda done, total: progress.update(task, description="merging", completed=done, total=total)
