"""Checkpoints are loaded by the ids of their repositories, and what goes wrong there is told."""

import re
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_server import Repository

import tunerkit
from tunerkit import PeftConfig, PeftModel, check_if_peft_model, get_peft_model, hotswap_adapter, load_peft_weights
from tunerkit.errors import CheckpointError, CheckpointNotFoundError, KeywordError
from tunerkit.testing.bench import move, same_bits
from tunerkit_lora import LoraConfig

X = torch.linspace(-1, 1, 15).reshape(5, 3)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def outputs(model):
    with torch.no_grad():
        return model.eval()(X)


def cached(folder):
    """Return every name in a folder, and the time of its last change."""
    return {path: path.lstat().st_mtime_ns for path in Path(folder).rglob("*")}


@pytest.fixture
def refused(make_base):
    """Give a call that fails to load, of a base model that is then as it was, and whose message is returned."""

    def refused(name="ann/adapter", error=CheckpointNotFoundError, **given):
        base = make_base()
        modules, state = list(base.modules()), {key: value.clone() for key, value in base.state_dict().items()}
        with pytest.raises(error) as caught:
            PeftModel.from_pretrained(base, name, **given)
        assert type(caught.value) is error
        assert list(base.modules()) == modules
        assert all(same_bits(value, state[key]) for key, value in base.state_dict().items())
        return str(caught.value)

    return refused


class TestCalls:
    def test_from_pretrained(self, there, model, make_base):
        loaded = PeftModel.from_pretrained(make_base(), "ann/adapter")
        assert same_bits(outputs(loaded), outputs(model))
        assert (outputs(loaded) - outputs(make_base())).abs().max() > 1e-3

    def test_load_adapter(self, there, model, make_base):
        other = get_peft_model(make_base(), LoraConfig(target_modules=["0"]))
        report = other.load_adapter("ann/adapter", "b")
        assert not report.missing_keys
        other.set_adapter("b")
        assert same_bits(outputs(other), outputs(model))

    def test_hotswap(self, there, model, make_base):
        other = get_peft_model(make_base(), LoraConfig(target_modules=["0", "2"], r=2))
        hotswap_adapter(other, "ann/adapter", "default", revision="main")
        assert same_bits(outputs(other), outputs(model))
        with pytest.raises(KeywordError, match=r"hotswap_adapter has no keyword argument 'revison'"):
            hotswap_adapter(other, "ann/adapter", "default", revison="main")

    def test_only_what_is_needed_is_fetched(self, hub, there, tmp_path):
        config = PeftConfig.from_pretrained("ann/adapter", revision="main", r=7)
        assert (config.r, config.revision) == (2, None)
        assert not any(WEIGHTS in asked for asked in hub.asked)
        hub.asked.clear()
        tensors = load_peft_weights("ann/adapter", cache_dir=tmp_path / "elsewhere")
        assert len(tensors) == 4
        assert not any(CONFIG in asked for asked in hub.asked)
        assert (tmp_path / "elsewhere").is_dir()

    def test_check_if_peft_model(self, there, hub):
        assert check_if_peft_model("ann/adapter") is True
        assert check_if_peft_model("ann/nothing") is False

    def test_folder_is_not_asked_for(self, hub, there, model, make_base, tmp_path):
        model.save_pretrained(tmp_path / "ann" / "adapter")
        PeftModel.from_pretrained(make_base(), "ann/adapter", revision="none", token="wrong")
        assert hub.asked == []

    @pytest.mark.parametrize(
        "name", ["./adapter", "../ann/x", "/ann/adapter", "~/adapter", "a/b/c", "a\\b", Path("a/b")]
    )
    def test_paths_are_not_asked_for(self, hub, refused, name):
        assert "There is no folder" in refused(name)
        assert hub.asked == []

    @pytest.mark.parametrize("name", ["saved/x", "a--b", "a/b.git", "x" * 97])
    def test_what_the_hub_would_not_take_is_not_asked_for(self, hub, files, refused, name):
        assert "There is no folder" in refused(name)
        assert hub.asked == []

    def test_name_without_a_user(self, hub, there, model, make_base):
        hub.repositories["adapter"] = there
        assert same_bits(outputs(PeftModel.from_pretrained(make_base(), "adapter")), outputs(model))


class TestFiles:
    def test_subfolder(self, hub, files, model, make_base):
        hub.repositories["ann/adapter"] = Repository()
        commit = hub.repositories["ann/adapter"].commit({f"run/b/{name}": data for name, data in files.items()})
        for subfolder in ("run/b", "run/b/"):
            loaded = PeftModel.from_pretrained(make_base(), "ann/adapter", subfolder=subfolder)
            assert same_bits(outputs(loaded), outputs(model))
        assert f"HEAD /ann/adapter/resolve/{commit}/run/b/{WEIGHTS}" in hub.asked
        assert PeftConfig.from_pretrained("ann/adapter", subfolder="run/b").r == 2
        assert len(load_peft_weights("ann/adapter", subfolder="run/b")) == 4

    def test_revision(self, there, model, make_base, files):
        old = there.refs["main"]
        move(model, "default", seed=3)
        model.save_pretrained("new")
        there.commit({WEIGHTS: Path("new", WEIGHTS).read_bytes()})
        there.refs["dev"] = old
        new = outputs(PeftModel.from_pretrained(make_base(), "ann/adapter"))
        assert same_bits(new, outputs(model))
        for revision in (old, "dev"):
            given = outputs(PeftModel.from_pretrained(make_base(), "ann/adapter", revision=revision))
            assert (given - new).abs().max() > 1e-3

    def test_both_files_are_of_one_commit(self, hub, there, model, make_base, monkeypatch):
        """A commit comes in between the two."""
        before, wanted = there.refs["main"], outputs(model)
        download = huggingface_hub.HfApi.hf_hub_download

        def meanwhile(api, repo, name, **given):
            path = download(api, repo, name, **given)
            there.commit({WEIGHTS: b"another rank's"})
            return path

        monkeypatch.setattr(huggingface_hub.HfApi, "hf_hub_download", meanwhile)
        assert same_bits(outputs(PeftModel.from_pretrained(make_base(), "ann/adapter")), wanted)
        assert there.refs["main"] != before

    def test_second_time_from_the_cache(self, hub, there, make_base):
        PeftModel.from_pretrained(make_base(), "ann/adapter")
        assert f"GET /ann/adapter/resolve/{there.refs['main']}/{WEIGHTS}" in hub.asked
        hub.asked.clear()
        PeftModel.from_pretrained(make_base(), "ann/adapter")
        assert hub.asked == [f"HEAD /ann/adapter/resolve/main/{CONFIG}"]
        hub.asked.clear()
        PeftModel.from_pretrained(make_base(), "ann/adapter", force_download=True)
        assert sum(asked.startswith("GET") for asked in hub.asked) == 2

    def test_nothing_is_written_into_the_cache(self, hub, there, model, make_base, files):
        """Not even what a save that was cut has left, and somebody uploaded."""
        save_id = "0" * 32
        left = f"{CONFIG}.{re.search(rb'tunerkit_save_id.:.([0-9a-f]{32})', files[WEIGHTS])[1].decode()}.tmp"
        assert save_id not in left
        there.commit({left: files[CONFIG], CONFIG: files[CONFIG].replace(b'"r": 2', b'"r": 3')})
        huggingface_hub.snapshot_download("ann/adapter")
        before = cached("cache")
        assert any(path.name == left for path in before)
        loaded = PeftModel.from_pretrained(make_base(), "ann/adapter")
        assert same_bits(outputs(loaded), outputs(model))
        assert cached("cache") == before

    def test_offline_with_the_cache(self, hub, there, model, make_base, monkeypatch):
        PeftModel.from_pretrained(make_base(), "ann/adapter")
        hub.asked.clear()
        loaded = PeftModel.from_pretrained(make_base(), "ann/adapter", local_files_only=True)
        assert same_bits(outputs(loaded), outputs(model))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        PeftModel.from_pretrained(make_base(), "ann/adapter")
        assert hub.asked == []

    def test_private(self, there, model, make_base, refused):
        there.private = True
        loaded = PeftModel.from_pretrained(make_base(), "ann/adapter", token="right")
        assert same_bits(outputs(loaded), outputs(model))
        assert load_peft_weights("ann/adapter", use_auth_token="right", cache_dir="new")


class TestRefused:
    def test_private(self, hub, there, refused):
        there.private = True
        expected = (
            f"There is no folder 'ann/adapter' here, and the hub ({hub.url}) shows no repository 'ann/adapter'. Check "
            "the id or the path; if the repository is private, pass token=..., or log in once with `hf auth login`."
        )
        assert refused() == refused(token="other") == expected
        message = refused(error=CheckpointError, token="wrong")
        assert f"The hub does not give '{CONFIG}' of the repository 'ann/adapter' to who asks" in message
        assert "If you may read it, pass token=..., or log in once" in message
        assert "wrong" not in message

    def test_no_repository(self, refused, hub, files):
        assert f"the hub ({hub.url}) shows no repository 'ann/nothing'. Check the id" in refused("ann/nothing")
        assert refused("savd").startswith("There is no folder 'savd' here (similar folders: 'saved'), and the hub")

    def test_gated(self, there, hub, refused):
        there.gated = True
        assert refused() == (
            f"The authors of the repository 'ann/adapter' say who may read it. Ask them at {hub.url}/ann/adapter; as "
            "the user whom they let in, pass token=..., or log in once with `hf auth login`."
        )

    def test_no_revision(self, there, hub, refused):
        assert refused(revision="v9") == (
            f"The repository 'ann/adapter' has no revision 'v9'. Check it at {hub.url}/ann/adapter: it is the name "
            "of a branch or a tag, or a commit; without revision=... it is 'main'."
        )

    def test_no_adapter(self, hub, files, refused):
        hub.repositories["ann/adapter"] = Repository()
        hub.repositories["ann/adapter"].commit({"config.json": b"{}", "model.safetensors": b""})
        message = refused()
        assert message.startswith(f"There is no '{CONFIG}' in the repository 'ann/adapter', which holds: 'config.json'")
        assert "This looks like a whole model" in message

    def test_an_adapter_in_a_folder(self, hub, files, refused):
        hub.repositories["ann/adapter"] = Repository()
        hub.repositories["ann/adapter"].commit({f"run/{name}": data for name, data in files.items()})
        assert refused() == (
            f"There is no '{CONFIG}' in the repository 'ann/adapter', which holds: 'run'. Checkpoints are in its "
            "folders 'run': pass one of them. On the hub that is subfolder='run'."
        )
        assert "in the folder 'x' of the repository 'ann/adapter', which is empty." in refused(subfolder="x")

    def test_pickle(self, there, refused):
        there.commits[there.refs["main"]]["adapter_model.bin"] = there.commits[there.refs["main"]].pop(WEIGHTS)
        message = refused()
        assert message.startswith(
            "The repository 'ann/adapter' holds its tensors as 'adapter_model.bin', a pickle, and"
        )
        assert "convert it once" in message

    def test_offline(self, hub, there, refused, monkeypatch):
        cache = huggingface_hub.constants.HF_HUB_CACHE
        assert refused(local_files_only=True) == (
            f"There is no folder 'ann/adapter' here, and '{CONFIG}' of the repository 'ann/adapter' is not in the "
            f"cache '{cache}'; the hub was not asked, as local_files_only=True. Load it "
            "once without, or pass a checkpoint's folder."
        )
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert "is not in the cache 'other'; the hub was not asked, as HF_HUB_OFFLINE is set." in refused(
            cache_dir="other"
        )
        assert hub.asked == []

    def test_no_network(self, refused, hub):
        message = refused(endpoint="http://127.0.0.1:9")
        assert "the hub (http://127.0.0.1:9) cannot be reached (ConnectError: " in message
        assert message.endswith("Check the network, or pass a checkpoint's folder.")

    def test_a_hub_that_fails(self, hub, there, refused):
        hub.broken = 503
        message = refused(error=CheckpointError)
        assert message.startswith(f"The hub ({hub.url}) did not give '{CONFIG}' of the repository 'ann/adapter' (HfHub")
        assert message.endswith("Try again later.")

    @pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
    def test_a_download_that_is_cut(self, hub, there, model, make_base, refused, files, name):
        hub.cut = name
        message = refused(error=CheckpointError)
        assert message.startswith(f"'{name}' of the repository 'ann/adapter' could not be downloaded (")
        assert "No part of it is taken for the file." in message
        assert not [path for path in Path("cache").rglob(name) if path.read_bytes() != files[name]]
        blobs = [path.read_bytes() for path in Path("cache").rglob("blobs/*") if path.is_file()]
        assert all(blob in files.values() for blob in blobs)
        hub.cut = None
        assert same_bits(outputs(PeftModel.from_pretrained(make_base(), "ann/adapter")), outputs(model))

    def test_keywords_that_cannot_be_heeded(self, there, refused, make_base, model):
        message = refused(error=KeywordError, proxies={"https": "x"})
        assert message == (
            "proxies={'https': 'x'} is not supported for a repository of the hub. Set the environment variable "
            "HTTPS_PROXY."
        )
        message = refused(error=KeywordError, local_dir="x")
        assert "Download the repository there with huggingface_hub.snapshot_download, and pass that folder." in message
        PeftModel.from_pretrained(make_base(), "ann/adapter", proxies=None, resume_download=True)

    def test_without_the_library(self, there, refused, monkeypatch):
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        assert refused(error=CheckpointError) == (
            "There is no folder 'ann/adapter' here, and loading from the Hugging Face Hub needs huggingface_hub, which "
            "is not installed: pip install 'tunerkit[hub]'"
        )


class TestAuto:
    """The adapter comes from the hub, and the base from a folder."""

    @pytest.fixture
    def adapter(self, hub, tmp_path):
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        torch.manual_seed(0)
        base = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, **sizes))
        base.save_pretrained(tmp_path / "base")
        base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
        move(model, "default")
        model.save_pretrained(tmp_path / "mine")
        hub.repositories["ann/adapter"] = Repository()
        hub.repositories["ann/adapter"].commit({path.name: path.read_bytes() for path in (tmp_path / "mine").iterdir()})
        return model.eval()

    def test_base_and_adapter(self, hub, adapter):
        loaded = tunerkit.AutoPeftModelForCausalLM.from_pretrained("ann/adapter", revision="main")
        tokens = torch.arange(12).reshape(2, 6)
        with torch.no_grad():
            assert same_bits(loaded(tokens).logits, adapter(tokens).logits)
        with pytest.raises(CheckpointNotFoundError, match="has no revision 'v9'"):
            tunerkit.AutoPeftModel.from_pretrained("ann/adapter", revision="v9")

    def test_a_larger_tokenizer(self, hub, adapter, tmp_path):
        import transformers
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel

        words = Tokenizer(WordLevel({f"w{number}": number for number in range(40)}, unk_token="w0"))
        transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "words")
        repository = hub.repositories["ann/adapter"]
        repository.commit({path.name: path.read_bytes() for path in (tmp_path / "words").iterdir()})
        loaded = tunerkit.AutoPeftModelForCausalLM.from_pretrained("ann/adapter")
        assert loaded.get_base_model().get_input_embeddings().weight.shape[0] == 40
