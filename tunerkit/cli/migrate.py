"""`tunerkit migrate`."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tunerkit.migration.rewriting import Migrated

_COLOURS = {"+": "green", "-": "red", "@": "cyan"}


@click.command
@click.argument("scripts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--write", is_flag=True, help="Write the files in place, each in one step.")
@click.option("--check", is_flag=True, help="Exit with 1 if a file would change.")
def migrate(*, scripts: tuple[Path, ...], write: bool, check: bool) -> None:
    """Rewrite what SCRIPTS import of PEFT, files or folders of them, so that it comes from tunerkit.

    Nothing is written without --write: the difference is printed. Below it stands what needs a look: names that are not
    in tunerkit, whose imports stay, and what only a person can judge, such as the text "peft". Comments and formatting
    are kept. Needs the extra: pip install 'tunerkit[migrate]'

    \b
    Exit status:
      0  all files were read
      1  a file cannot be read as Python, or cannot be written; the others are done all the same
      1  with --check: a file would change
    """  # noqa: D301 - click reads \b
    if write and check:
        msg = "--check writes nothing, and --write does: choose one of them."
        raise click.UsageError(msg)
    rewrite = _rewriting()
    from tunerkit.migration.files import find_scripts, replace  # noqa: PLC0415 - keeps --help quick

    changed = failed = 0
    looks: list[str] = []
    found = find_scripts(scripts)
    for path in found:
        try:
            source = path.read_bytes()
            migrated = rewrite(source)
            if write and migrated.source != source:
                replace(path, migrated.source)
        except (OSError, SyntaxError) as error:
            failed += 1
            click.echo(f"{path} is left as it is: {error}", err=True)
            continue
        changed += migrated.source != source
        for line in _difference(path, source, migrated):
            click.secho(line, fg=_COLOURS.get(line[0]))
        looks.extend(f"{path}:{line}: {what}: {why}" for line, what, why in migrated.findings)
    if looks:
        click.secho("Needs a look:", bold=True)
    for look in looks:
        click.echo(look)
    click.echo(_summary(len(found), changed, failed, write=write))
    if failed or (check and changed):
        raise SystemExit(1)


def _rewriting() -> Callable[[bytes], Migrated]:
    try:
        import libcst  # noqa: F401, PLC0415 - of the extra, and slow
    except ModuleNotFoundError as error:
        msg = "tunerkit migrate needs libcst, which is not installed: pip install 'tunerkit[migrate]'"
        raise click.ClickException(msg) from error
    from tunerkit.migration.rewriting import migrate as rewrite  # noqa: PLC0415 - imports libcst

    return rewrite


def _difference(path: Path, source: bytes, migrated: Migrated) -> Iterator[str]:
    before, after = (text.decode(errors="replace").splitlines() for text in (source, migrated.source))
    return difflib.unified_diff(before, after, str(path), str(path), lineterm="")


def _summary(found: int, changed: int, failed: int, *, write: bool) -> str:
    files = f"{found} file{'s' * (found != 1)}"
    left = f", {failed} left as {'they are' if failed > 1 else 'it is'}" if failed else ""
    if not changed:
        return f"{files}: nothing to change{left}."
    if write:
        return f"{files}: {changed} written{left}."
    return f"{files}: {changed} to change{left}. Nothing was written: --write does."
