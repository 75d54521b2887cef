"""The wheels as they are built, and their use in an environment that holds nothing else of this repository."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest
from wheels import LIBRARIES, PROJECTS, ROOT, SCRIPTS, run


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
    assert not [entry for entry in names if entry.endswith(".py") and ("/tests/" in entry or "/test_" in entry)]


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
