"""`tunerkit new`."""

from __future__ import annotations

import datetime as dt
import sys
from importlib.metadata import version
from pathlib import Path

import click

TEMPLATE = Path(__file__).parents[1] / "template"
KINDS = ("additive", "transform", "forward", "shared")


@click.command
@click.argument("name")
@click.option("--kind", type=click.Choice(KINDS), help="What the method does to a layer: adds to the weight, ...")
@click.option("--title", help="The method's name, as people write it.")
@click.option("--description", help="The method in one line.")
@click.option("--author", help="Who holds the copyright.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(),
    help="The folder in which the package's own folder is made; this one if not given.",
)
@click.option("--defaults", is_flag=True, help="Ask nothing, and take the default for what is not given.")
def new(*, name: str, out: Path, defaults: bool, **given: str | None) -> None:
    """Write a package for a new method NAME, ready to be tested and published, into ./tunerkit-NAME.

    It has the method's settings, its maths, its tests, a licence and a file for CI. What is not given as an option is
    asked in a terminal; elsewhere the defaults are taken. The kinds differ in what the maths starts from:

    \b
      additive   adds to the weight, here a product of two small matrices
      transform  transforms the weight, here by scaling its rows
      forward    has a forward of its own, here of a small network
      shared     shares tensors over all layers, here two random matrices
    """  # noqa: D301 - click reads \b
    from tunerkit.naming import method_id  # noqa: PLC0415 - keeps --help quick
    from tunerkit.plugins import method_ids  # noqa: PLC0415

    method = method_id(name)  # in whatever spelling
    folder = out / f"tunerkit-{method}"
    if folder.exists():
        msg = f"'{folder}' is there already. Choose another name or another --out, or remove it first."
        raise click.ClickException(msg)
    if not method[0].isalpha():
        msg = f"{method!r} begins with a digit, and so would the names of its tensors, which Python does not allow."
        raise click.ClickException(msg)
    if method in method_ids():
        msg = f"The method {method!r} is installed already, and two packages cannot offer one. Choose another name."
        raise click.ClickException(msg)
    answers = {key: value for key, value in given.items() if value is not None}
    answers |= {"method": method, "core": _range(), "year": str(dt.datetime.now(tz=dt.timezone.utc).year)}
    _fill_in(folder, answers, ask=not defaults and sys.stdin.isatty())
    click.echo(f"Written to {folder}. What comes next:\n")
    click.echo(f"  cd {folder}\n  pip install -e '.[test]'\n  pytest\n  tunerkit check {method}\n")
    click.echo(f"The maths is in tunerkit_{method.replace('-', '_')}/adapter.py.")


def _range() -> str:
    """Return which versions of the core a package written now works with: up to the next one that may break it."""
    major, minor, *_ = version("tunerkit").split(".")
    return f">={major}.{minor},<{major}.{int(minor) + 1}" if major == "0" else f">={major}.{minor},<{int(major) + 1}"


def _fill_in(folder: Path, answers: dict[str, str], *, ask: bool) -> None:
    try:
        from copier import run_copy  # noqa: PLC0415 - of the extra, and slow
        from copier.errors import CopierAnswersInterrupt, CopierError  # noqa: PLC0415
    except ModuleNotFoundError as error:
        msg = "tunerkit new needs copier, which is not installed: pip install 'tunerkit[testing]'"
        raise click.ClickException(msg) from error
    try:
        run_copy(str(TEMPLATE), folder, data=answers, defaults=not ask, quiet=True)
    except CopierAnswersInterrupt as error:
        msg = f"Nothing was written to '{folder}': the questions were broken off."
        raise click.ClickException(msg) from error
    except (OSError, ValueError, CopierError) as error:
        msg = f"Nothing was written to '{folder}': {error}"
        raise click.ClickException(msg) from error
