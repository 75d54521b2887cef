"""`tunerkit doctor`."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from tunerkit.diagnosis import Candidate, Diagnosis


@click.command
@click.option("--json", "as_json", is_flag=True, help="Print plain data instead of text.")
def doctor(*, as_json: bool) -> None:
    """Say what is installed, what is wrong with it and what to do.

    Every plugin that is allowed is loaded. Exits with 1 if there is a problem.
    """
    from tunerkit.diagnosis import diagnose  # noqa: PLC0415 - keeps --help quick

    found = diagnose()
    click.echo(json.dumps(dataclasses.asdict(found), indent=2) if as_json else _text(found))
    if found.problems:
        raise SystemExit(1)


def _text(found: Diagnosis) -> str:
    parts = {
        "Versions": [f"{name}: {version or 'not installed'}" for name, version in found.versions.items()],
        "Plugins": [_line(candidate) for candidate in found.candidates] or ["none"],
        "Environment": [f"{name}: {value}" for name, value in found.environment.items()],
        "Devices": found.devices,
        "Problems": found.problems or ["none"],
    }
    return "\n".join(f"{title}\n" + "".join(f"  {line}\n" for line in lines) for title, lines in parts.items())


def _line(candidate: Candidate) -> str:
    return (
        f"{candidate.name} ({candidate.kind}): {candidate.package} {candidate.version} in {candidate.path}, "
        f"{candidate.module} from {candidate.imported_from or 'nowhere'}"
    )
