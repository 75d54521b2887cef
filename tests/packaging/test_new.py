"""What `tunerkit new` writes, as an author has it: tested, built, installed from its wheel and used."""

import sys

import pytest
from wheels import SCRIPTS, run

from tunerkit.cli.new import KINDS

USE = """
import torch
from torch import nn
from tunerkit import PeftModel, get_peft_model
from tunerkit.config import config_class

def make_base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))

model = get_peft_model(make_base(), config_class("{method}")(target_modules=["0", "1"]))
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
x = torch.randn(4, 6)
model(x).square().sum().backward()
optimizer.step()
model.save_pretrained("saved")
torch.testing.assert_close(PeftModel.from_pretrained(make_base(), "saved")(x), model(x))
"""


@pytest.mark.parametrize("kind", KINDS)
def test_package(kind, fresh, tmp_path):
    command, python = fresh / SCRIPTS / "tunerkit", fresh / SCRIPTS / "python"
    method = f"new-{kind}"
    told = run(command, "new", method, "--kind", kind, "--out", tmp_path, cwd=tmp_path)
    assert f"tunerkit check {method}" in told
    project = tmp_path / f"tunerkit-{method}"
    pip = (sys.executable, "-m", "pip")
    build = ("wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", tmp_path, project)
    run(*pip, *build, cwd=tmp_path)
    [wheel] = tmp_path.glob("*.whl")
    run(*pip, "--python", python, "install", "-q", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    try:
        run(python, "-I", "-W", "error", "-c", USE.format(method=method), cwd=tmp_path)
        tested = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=project)
        assert " passed" in tested
        assert f"{method}: " in run(command, "check", method, cwd=tmp_path)
    finally:
        run(*pip, "--python", python, "uninstall", "-q", "-y", f"tunerkit-{method}", cwd=tmp_path)
