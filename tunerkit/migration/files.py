"""Scripts on disk: which there are, and how one is exchanged for another."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


def find_scripts(paths: Iterable[Path]) -> list[Path]:
    """Return the paths that are no folders, and what ends with `.py` in those that are, each once.

    Folders whose name begins with a dot, and virtual environments, are not looked through.
    """
    found = {script.resolve(): script for path in paths for script in (_below(path) if path.is_dir() else [path])}
    return list(found.values())


def _below(folder: Path) -> Iterator[Path]:
    for above, folders, files in os.walk(folder):
        folders[:] = sorted(
            name for name in folders if not (name.startswith(".") or Path(above, name, "pyvenv.cfg").exists())
        )
        yield from (Path(above, name) for name in sorted(files) if name.endswith(".py"))


def replace(path: Path, content: bytes) -> None:
    """Exchange a file's content in one step: whoever reads it finds the old one or the new one, whole.

    A link stays one, and its target is exchanged.

    Raises:
        OSError: It cannot be written; the file is as it was.
    """
    path = path.resolve()
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(path, name)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink()
        raise
