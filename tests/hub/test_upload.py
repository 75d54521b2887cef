"""Adapters and configs are uploaded to a hub, and come back from there the same."""

import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_server import Repository

from tunerkit import PeftConfig, PeftModel
from tunerkit.errors import CheckpointError, KeywordError, UnknownAdapterError
from tunerkit.testing.bench import same_bits
from tunerkit_lora import LoraConfig

X = torch.linspace(-1, 1, 15).reshape(5, 3)
CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"


@pytest.fixture(autouse=True)
def login(hub, monkeypatch):
    """The user has logged in."""
    monkeypatch.setenv("HF_TOKEN", "right")


def latest(repository, revision="main"):
    """Return the files of a branch that were put there; the hub itself begins with one."""
    files = repository.commits[repository.refs[revision]]
    return {name: data for name, data in files.items() if name != ".gitattributes"}


def refusal(call, *arguments, error=CheckpointError, **given):
    with pytest.raises(error) as caught:
        call(*arguments, **given)
    return str(caught.value)


class TestModel:
    def test_round_trip(self, hub, model, make_base):
        info = model.push_to_hub("ann/new", "First", private=True, tags=["mine"])
        repository = hub.repositories["ann/new"]
        assert info.oid == repository.refs["main"]
        assert repository.messages == ["First"]
        assert repository.private
        assert latest(repository).keys() == {CONFIG, WEIGHTS, CARD}
        assert b"- mine\n" in latest(repository)[CARD]
        loaded = PeftModel.from_pretrained(make_base(), "ann/new")
        with torch.no_grad():
            assert same_bits(loaded.eval()(X), model(X))
            assert (loaded(X) - make_base()(X)).abs().max() > 1e-3

    def test_several_adapters(self, hub, model, make_base):
        model.add_adapter("b", LoraConfig(target_modules=["0"], r=3))
        model.push_to_hub("new")
        repository = hub.repositories["ann/new"]
        assert latest(repository).keys() == {CONFIG, WEIGHTS, CARD, f"b/{CONFIG}", f"b/{WEIGHTS}"}
        assert repository.messages == ["Upload adapter"]
        assert PeftConfig.from_pretrained("ann/new", subfolder="b").r == 3
        model.push_to_hub("other", selected_adapters=["b"])
        assert latest(hub.repositories["ann/other"]).keys() == {CARD, f"b/{CONFIG}", f"b/{WEIGHTS}"}

    def test_the_card_there_is_kept(self, hub, model):
        repository = hub.repositories["ann/new"] = Repository()
        repository.commit({CARD: b"---\nlicense: mit\n---\n\nMy own words.\n", "else.txt": b"x"})
        model.push_to_hub("new", max_shard_size="1GB")
        card = latest(repository)[CARD].decode()
        assert "license: mit\n" in card
        assert "My own words." in card
        assert "library_name: peft\n" in card
        assert latest(repository)["else.txt"] == b"x"

    def test_branch_and_pull_request(self, hub, model):
        repository = hub.repositories["ann/new"] = Repository()
        before = repository.commit({CARD: b""})
        model.push_to_hub("ann/new", revision="dev")
        assert CONFIG in latest(repository, "dev")
        info = model.push_to_hub("ann/new", create_pr=True)
        assert info.pr_url == f"{hub.url}/ann/new/discussions/1"
        assert repository.refs["main"] == before

    def test_save_pretrained(self, hub, model, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "optimizer.pt").write_bytes(b"")
        assert model.save_pretrained("run", push_to_hub=True, commit_message="Done", private=True) is None
        assert hub.repositories["ann/run"].messages == ["Done"]
        assert hub.repositories["ann/run"].private
        written = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
        assert latest(hub.repositories["ann/run"]) | {"optimizer.pt": b""} == written
        model.save_pretrained("run", push_to_hub=True, repo_id="ann/named", is_main_process=False)
        model.save_pretrained("run", push_to_hub=False, repo_id="ann/named")
        assert "ann/named" not in hub.repositories


def test_peft_reads_what_was_uploaded(hub, model, make_base):
    peft = pytest.importorskip("peft", reason="comparing with PEFT needs it")
    model.push_to_hub("ann/new")
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(make_base(), "ann/new").eval()(X)
    torch.testing.assert_close(theirs, model(X))


def test_what_peft_uploads_is_read(hub, make_base):
    peft = pytest.importorskip("peft", reason="comparing with PEFT needs it")
    config = peft.LoraConfig(target_modules=["0", "2"], init_lora_weights=False)
    model = peft.get_peft_model(make_base(), config).eval()
    model.push_to_hub("ann/new")
    with torch.no_grad():
        torch.testing.assert_close(PeftModel.from_pretrained(make_base(), "ann/new").eval()(X), model(X))
    card = latest(hub.repositories["ann/new"])[CARD]
    assert b"library_name: transformers" in card  # the difference that the documentation tells of
    assert b"peft" not in card.lower()


class TestConfig:
    def test_round_trip(self, hub):
        LoraConfig(target_modules=["x"], r=5).push_to_hub("ann/new", commit_message="The config")
        assert hub.repositories["ann/new"].messages == ["The config"]
        assert latest(hub.repositories["ann/new"]).keys() == {CONFIG}
        assert PeftConfig.from_pretrained("ann/new").r == 5


class TestRefused:
    @pytest.mark.parametrize("token", ["other", "wrong"])
    def test_no_permission(self, hub, model, token):
        hub.repositories["ann/new"] = Repository()
        hub.repositories["ann/new"].commit({})
        before = dict(hub.repositories["ann/new"].refs)
        message = refusal(model.push_to_hub, "ann/new", token=token)
        assert message.startswith(
            f"Nothing was uploaded to 'ann/new': the hub ({hub.url}) does not let you write there (HfHubHTTPError: "
        )
        advice = "Check the id; as a user who may write, pass token=..., or log in once with `hf auth login`."
        assert message.endswith(advice)
        assert hub.repositories["ann/new"].refs == before
        assert "does not let you write there" in refusal(model.push_to_hub, "bob/new")
        assert "bob/new" not in hub.repositories

    def test_offline(self, hub, model, tmp_path, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        message = "Nothing was uploaded to 'run', as HF_HUB_OFFLINE is set. Save, and upload the folder later."
        assert refusal(model.save_pretrained, "run", push_to_hub=True) == message
        assert (tmp_path / "run" / WEIGHTS).is_file()
        assert "as HF_HUB_OFFLINE is set" in refusal(LoraConfig().push_to_hub, "ann/new")
        assert hub.asked == []

    def test_no_network(self, model, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
        assert refusal(model.push_to_hub, "ann/new").startswith(
            "Nothing was uploaded to 'ann/new' on the hub (http://127.0.0.1:9): ConnectError: "
        )

    def test_no_id(self, model, hub):
        assert "HFValidationError: Repo id must be" in refusal(model.push_to_hub, "a/b/c")

    def test_what_is_refused_makes_no_repository(self, hub, model):
        assert refusal(model.push_to_hub, "new", tokn="x", error=KeywordError) == (
            "push_to_hub has no keyword argument 'tokn'. Leave it out."
        )
        refusal(model.push_to_hub, "new", is_main_process=False, error=KeywordError)
        refusal(model.push_to_hub, "new", selected_adapters=["b"], error=UnknownAdapterError)
        assert hub.asked == []

    def test_without_the_library(self, model, monkeypatch):
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        assert refusal(model.push_to_hub, "ann/new") == (
            "Uploading to the Hugging Face Hub needs huggingface_hub, which is not installed: "
            "pip install 'tunerkit[hub]'"
        )


SCRIPT = """
import os, torch, tunerkit
from tunerkit_lora import LoraConfig

def base():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 3))

x = torch.ones(2, 3)
if "HF_HUB_OFFLINE" not in os.environ:
    model = tunerkit.get_peft_model(base(), LoraConfig(target_modules=["0"], init_lora_weights=False))
    model.push_to_hub("mine", private=True)
    torch.save(model(x), "output.pt")
loaded = tunerkit.PeftModel.from_pretrained(base(), "ann/mine")
torch.testing.assert_close(loaded(x), torch.load("output.pt"))
assert (loaded(x) - base()(x)).abs().max() > 1e-3
"""


def test_as_the_environment_says(hub, tmp_path):
    """A script without a word about the hub's place, as users write it; the second time without a network."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "right"}
    script = Path(tmp_path, "script.py")
    script.write_text(SCRIPT, encoding="utf-8")
    for place in ({"HF_ENDPOINT": hub.url}, {"HF_HUB_OFFLINE": "1"}):
        subprocess.run([sys.executable, script], env=environment | place, cwd=tmp_path, check=True)
    assert hub.repositories["ann/mine"].private
    assert (tmp_path / "home" / "hub").is_dir()
