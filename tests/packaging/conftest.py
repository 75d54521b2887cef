"""The wheels, and an environment that holds nothing else of this repository."""

import os
import shutil
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from wheels import PROJECTS, ROOT, SCRIPTS, run


@pytest.fixture(scope="session")
def wheels(tmp_path_factory):
    """Build every project from a copy, so that nothing is left in the tree."""
    folder = tmp_path_factory.mktemp("wheels")
    copy = folder / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__"))
    for path in PROJECTS.values():
        source = copy / path.relative_to(ROOT)
        pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index")
        run(*pip, "-w", folder, source, cwd=folder)
    return {path.name.partition("-")[0].replace("_", "-"): path for path in folder.glob("*.whl")}


@pytest.fixture(scope="session")
def fresh(wheels, tmp_path_factory):
    """An environment with the wheels, and through a `.pth` file what else the running one holds."""
    folder = tmp_path_factory.mktemp("fresh")
    others = folder / "others"
    others.mkdir()
    for site in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(site).iterdir():
            if "tunerkit" not in entry.name and entry.suffix != ".pth" and not (others / entry.name).exists():
                (others / entry.name).symlink_to(entry)
    home = folder / "env"
    venv.create(home, symlinks=os.name != "nt")
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(home), "platbase": str(home)}))
    (site / "others.pth").write_text(f"{others}\n", encoding="utf-8")
    python = home / SCRIPTS / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index")
    run(*pip, *wheels.values(), cwd=folder)
    return home
