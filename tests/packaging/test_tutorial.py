"""The tutorials for authors, followed from an empty folder with the wheels only: what they show is what happens."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from wheels import ROOT, SCRIPTS, TUTORIALS, run

BLOCK = re.compile(
    r"(?:^<!-- file: (?P<file>\S+) -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass
class Block:
    """A block of a page: a command, a program, a file that is to be written, or what was printed."""

    file: str | None
    language: str
    code: str


def blocks_of(page):
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    return [Block(**match.groupdict()) for match in BLOCK.finditer(text)]


@pytest.fixture
def shell(fresh, tmp_path):
    """Run commands one after the other as in one shell, in the fresh environment."""
    tools = tmp_path / "tools"
    tools.mkdir()
    python = fresh / SCRIPTS / "python"
    for name in ("pip", "pytest"):
        tool = tools / name
        tool.write_text(f'#!/bin/sh\nexec "{python}" -m {name} "$@"\n', encoding="utf-8")
        tool.chmod(0o755)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV", "TUNERKIT"))}
    # There is no package index here; what builds the wheel is in the environment.
    env |= {
        "PIP_NO_INDEX": "1",
        "PIP_NO_DEPS": "1",
        "PIP_NO_BUILD_ISOLATION": "0",
        "PYTEST_ADDOPTS": "-p no:cacheprovider",
    }
    env["PATH"] = os.pathsep.join([str(tools), str(fresh / SCRIPTS), env["PATH"]])
    folder = tmp_path / "work"
    folder.mkdir()

    class Shell:
        where = folder

        def run(self, code):
            done = subprocess.run(
                ["/bin/sh", "-ec", f"{code}\npwd"], cwd=self.where, env=env, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
            printed, _, last = done.stdout.rstrip("\n").rpartition("\n")
            self.where = Path(last)
            return printed

        def program(self, code):
            script = self.where / "program.py"
            script.write_text(code, encoding="utf-8")
            printed = self.run("python -W error program.py")
            script.unlink()
            return printed

    return Shell()


def matches(shown, printed):
    """Return whether something was printed as a page shows it, in which three dots stand for anything."""
    parts = (re.escape(part) for part in shown.strip("\n").split("..."))
    return re.fullmatch(".*".join(parts), printed.strip("\n"), re.DOTALL) is not None


@pytest.mark.parametrize(("page", "method"), TUTORIALS.items())
def test_followed(page, method, shell, fresh, tmp_path):
    printed = None
    try:
        for block in blocks_of(page):
            if block.language == "text":
                assert printed is not None
                assert matches(block.code, printed), f"The page shows\n{block.code}\nand this was printed:\n{printed}"
            elif block.file is not None:
                (shell.where / block.file).write_text(block.code, encoding="utf-8")
            elif block.language == "toml":
                assert block.code in (shell.where / "pyproject.toml").read_text(encoding="utf-8")
            else:
                printed = {"sh": shell.run, "python": shell.program}[block.language](block.code)
    finally:
        pip = (sys.executable, "-m", "pip", "--python", fresh / SCRIPTS / "python")
        run(*pip, "uninstall", "-q", "-y", f"tunerkit-{method}", cwd=tmp_path)
    example = ROOT / "examples" / f"tunerkit-{method}"
    if example.is_dir():
        assert files(example) == files(tmp_path / "work" / f"tunerkit-{method}")


def files(folder):
    """Return the text of a package's files; whose it is and since when is for each author to say."""
    skipped = {"LICENSE", "dist", "build", "adapter", "__pycache__"}
    paths = [
        path for path in folder.rglob("*") if path.is_file() and skipped.isdisjoint(path.relative_to(folder).parts)
    ]
    return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in paths}
