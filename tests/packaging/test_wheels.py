"""The wheels as they are built, and their use in an environment that holds nothing else of this repository."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECTS = {"tunerkit": ROOT} | {path.name: path for path in sorted((ROOT / "plugins").iterdir()) if path.is_dir()}
LIBRARIES = {"bitsandbytes"}
"""What a package is named after that is no method: it says what the layers of a library are."""
SCRIPTS = "Scripts" if os.name == "nt" else "bin"


def run(*command, cwd):
    """Run a command that sees neither this tree nor what the running Python was told about it."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV", "TUNERKIT"))}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
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


def test_every_project_is_built(wheels):
    assert wheels.keys() == PROJECTS.keys()


@pytest.mark.parametrize("name", PROJECTS)
def test_wheel_holds_the_package_and_nothing_else(name, wheels):
    module = name.replace("-", "_")
    with zipfile.ZipFile(wheels[name]) as wheel:
        names = wheel.namelist()
        info = next(entry.partition("/")[0] for entry in names if entry.endswith(".dist-info/METADATA"))
        licence = wheel.read(f"{info}/licenses/LICENSE")
    assert {entry.partition("/")[0] for entry in names} == {module, info}
    assert f"{module}/py.typed" in names
    assert f"{module}/__init__.py" in names
    assert licence == (ROOT / "LICENSE").read_bytes()
    sources = {path.relative_to(PROJECTS[name]).as_posix() for path in (PROJECTS[name] / module).rglob("*.py")}
    assert {entry for entry in names if entry.endswith(".py")} == sources
    assert not [entry for entry in names if "/tests/" in entry or "/test_" in entry]


@pytest.mark.parametrize("name", [name for name in PROJECTS if name != "tunerkit"])
def test_plugin_asks_for_a_range_of_the_core_and_announces_its_method(name, wheels):
    method = name.removeprefix("tunerkit-")
    with zipfile.ZipFile(wheels[name]) as wheel:
        info = next(entry.partition("/")[0] for entry in wheel.namelist() if entry.endswith(".dist-info/METADATA"))
        metadata = wheel.read(f"{info}/METADATA").decode()
        entry_points = wheel.read(f"{info}/entry_points.txt").decode()
    assert "Requires-Dist: tunerkit<0.2,>=0.1" in metadata.splitlines()
    assert "Requires-Python: >=3.10" in metadata.splitlines()
    group = "tunerkit.sites" if method in LIBRARIES else "tunerkit"
    assert entry_points.split("\n")[:2] == [f"[{group}]", f"{method} = {name.replace('-', '_')}"]


def test_attach_train_save_load_and_merge(fresh, tmp_path):
    script = shutil.copy(Path(__file__).parent / "session.py", tmp_path)
    files = run(fresh / SCRIPTS / "python", "-I", "-W", "error", script, cwd=tmp_path).split("\n")
    assert len(files) == 4
    assert all(Path(file).is_relative_to(fresh) for file in files[:3])


def test_installed_methods_are_listed(fresh, tmp_path):
    rows = json.loads(run(fresh / SCRIPTS / "tunerkit", "plugins", "--json", cwd=tmp_path))
    packages = {name for name in PROJECTS if name != "tunerkit"}
    assert {row["package"] for row in rows} == packages
    assert all(row["package"] == f"tunerkit-{row['method']}" for row in rows)
    assert {row["method"] for row in rows if row["kind"] == "sites"} == LIBRARIES
    assert {(row["version"], row["status"]) for row in rows} == {("0.1.0", "not loaded")}
    table = run(fresh / SCRIPTS / "tunerkit", "plugins", "--check", cwd=tmp_path)
    assert "tunerkit-ia3" in table
    assert "tunerkit-lora" in table
    assert "broken" not in table
