"""The projects of this repository, and commands that see nothing of its tree."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECTS = {"tunerkit": ROOT} | {path.name: path for path in sorted((ROOT / "plugins").iterdir()) if path.is_dir()}
LIBRARIES = {"bitsandbytes"}
"""What a package is named after that is no method: it says what the layers of a library are."""
TUTORIALS = {"write-a-method": "ssf", "share-tensors": "direction"}
"""The pages of the documentation that build a package, with its method."""
SCRIPTS = "Scripts" if os.name == "nt" else "bin"


def run(*command, cwd):
    """Run a command that sees neither this tree nor what the running Python was told about it."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV", "TUNERKIT"))}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout
