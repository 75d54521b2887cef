import time

import huggingface_hub.constants
import huggingface_hub.hf_api
import pytest
import torch
from hub_server import Repository, serving
from torch import nn

from tunerkit import get_peft_model
from tunerkit.testing.bench import move
from tunerkit_lora import LoraConfig


def base_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


@pytest.fixture
def make_base():
    return base_model


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on this machine, which huggingface_hub takes for the real one, with nothing in its cache yet."""
    with serving() as server:
        constants = {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
        }
        for name, value in constants.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        # PEFT and transformers each have one that asks, made where and when the first test needed it.
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(time, "sleep", lambda _: None)  # huggingface_hub waits before it tries again
        monkeypatch.chdir(tmp_path)
        yield server


@pytest.fixture
def model():
    model = get_peft_model(base_model(), LoraConfig(target_modules=["0", "2"], r=2))
    move(model, "default")
    return model.eval()


@pytest.fixture
def files(model, tmp_path):
    """What a folder with an adapter holds."""
    model.save_pretrained(tmp_path / "saved")
    return {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}


@pytest.fixture
def there(hub, files):
    """The repository `ann/adapter`, with an adapter in it."""
    hub.repositories["ann/adapter"] = Repository()
    hub.repositories["ann/adapter"].commit(files)
    return hub.repositories["ann/adapter"]
