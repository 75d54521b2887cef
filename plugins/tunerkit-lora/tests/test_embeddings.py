"""Embeddings of the base model in checkpoints, here and in PEFT."""

import copy
import types
import warnings

import pytest
import torch
from torch import nn

import tunerkit
from tunerkit import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from tunerkit.errors import AdapterStateError, CheckpointError, ConfigError, SaveWarning
from tunerkit.testing.bench import Snapshot
from tunerkit.testing.parity import assert_close, assert_same_tensors, peft_config, quiet, run
from tunerkit_lora import LoraConfig

peft = pytest.importorskip("peft", reason="comparing with PEFT needs it: pip install peft")
transformers = pytest.importorskip("transformers", reason="PEFT's models to compare on are those of transformers")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def llama(vocab_size=40, **others):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        vocab_size=vocab_size,
        max_position_embeddings=16,
        initializer_range=0.3,
        **others,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def base():
    return llama()


INPUTS = {"input_ids": torch.arange(6)[None]}
TARGETS = [
    ["q_proj"],
    ["q_proj", "embed_tokens"],
    ["q_proj", "lm_head"],
    ["embed_tokens", "lm_head"],
    ["model.embed_tokens"],
    r".*(embed_tokens|q_proj)",
    r".*q_proj",
    "all-linear",
]


def moved(model, seed=3):
    """Move all of a model's weights that are its embeddings' or an adapter's."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "embed_tokens" in name or "lm_head" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("choice", ["auto", True, False])
@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_what_is_saved(base, targets, choice):
    config = LoraConfig(target_modules=targets)
    ours = get_peft_model(copy.deepcopy(base), config)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft_config(config))
    with warnings.catch_warnings(record=True) as their_warnings:
        warnings.simplefilter("always")
        expected = peft.get_peft_model_state_dict(theirs, save_embedding_layers=choice)
    with warnings.catch_warnings(record=True) as our_warnings:
        warnings.simplefilter("always")
        found = get_peft_model_state_dict(ours, save_embedding_layers=choice)
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in expected.items()}
    assert [item.category for item in our_warnings] == [SaveWarning] * len(their_warnings)
    assert_same_tensors(
        {key: value for key, value in found.items() if "lora" not in key},
        {key: value for key, value in expected.items() if "lora" not in key},
    )


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens", "lm_head"]], ids=str)
def test_files_both_ways(base, targets, tmp_path):
    config = LoraConfig(target_modules=targets)
    ours = moved(get_peft_model(copy.deepcopy(base), config).eval())
    output = run(ours, INPUTS)
    assert (output - run(base, INPUTS)).abs().max() > 1e-3
    ours.save_pretrained(tmp_path / "ours", save_embedding_layers=True)
    with quiet():
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert_close(run(theirs, INPUTS), output)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs")
    assert torch.equal(run(again, INPUTS), run(ours, INPUTS))
    # What a file brings of the base model stays with it.
    plain = again.unload()
    assert torch.equal(plain.lm_head.weight, ours.unload().lm_head.weight)
    assert not torch.equal(plain.lm_head.weight, base.lm_head.weight)


def test_a_file_of_another_form(base, tmp_path):
    """In PEFT a layer is adapted whoever adapts it, so its key may hold `base_layer` or lack it."""
    ours = moved(get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["q_proj"])).eval())
    ours.add_adapter("b", LoraConfig(target_modules=["lm_head"]))
    state = get_peft_model_state_dict(ours, save_embedding_layers=True)
    assert "base_model.model.lm_head.weight" in state
    model = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["q_proj"]))
    renamed = {key.replace("lm_head.", "lm_head.base_layer."): value for key, value in state.items()}
    for form in (state, renamed):
        with torch.no_grad():
            model.base_model.model.lm_head.weight.zero_()
        report = set_peft_model_state_dict(model, form)
        assert report.complete
        assert torch.equal(model.base_model.model.lm_head.weight, state["base_model.model.lm_head.weight"])


class TestVocabulary:
    @pytest.fixture
    def source(self, base, tmp_path):
        base.save_pretrained(tmp_path / "base")
        return str(tmp_path / "base")

    def test_that_was_resized(self, source, tmp_path):
        config = LoraConfig(target_modules=["q_proj"])
        keys = []
        for library, settings in ((None, config), (peft, peft_config(config))):
            base = transformers.LlamaForCausalLM.from_pretrained(source).eval()
            base.resize_token_embeddings(43, mean_resizing=False)
            if library is None:
                ours = moved(get_peft_model(base, settings))
                with pytest.warns(SaveWarning) as caught:
                    ours.save_pretrained(tmp_path / "ours")
                assert [str(item.message) for item in caught] == [
                    (
                        "The base model's embeddings are saved with the adapter 'default', because the model's "
                        f"vocabulary has 43 entries, and {source!r} says 40. Pass save_embedding_layers=False if "
                        "they are not to be."
                    )
                ]
                keys.append(set(get_peft_model_state_dict(ours, save_embedding_layers=True)))
            else:
                theirs = library.get_peft_model(base, settings)
                with pytest.warns(UserWarning, match="has been resized"):
                    keys.append(set(library.get_peft_model_state_dict(theirs)))
        assert keys[0] == keys[1]
        before = transformers.LlamaForCausalLM.from_pretrained(source)
        state = Snapshot.of(before)
        with pytest.raises(CheckpointError, match=r"embed_tokens.weight is \(43, 16\), the adapter's \(40, 16\)"):
            PeftModel.from_pretrained(before, tmp_path / "ours")
        assert state.differences(before) == []

    def test_that_is_the_same(self, source):
        model = get_peft_model(
            transformers.LlamaForCausalLM.from_pretrained(source), LoraConfig(target_modules=["q_proj"])
        )
        assert model.peft_config["default"].base_model_name_or_path == source
        assert not any("lm_head" in key for key in get_peft_model_state_dict(model))

    @pytest.mark.parametrize("text", ["{", "[]", "{}"])
    def test_that_no_file_states(self, base, tmp_path, text):
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
        base.config.vocab_size = 50
        model = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
        for source in (str(tmp_path), str(tmp_path / "none"), "some/model"):
            model.peft_config["default"].base_model_name_or_path = source
            assert not any("lm_head" in key for key in get_peft_model_state_dict(model))


class TestRefusals:
    def test_a_choice_that_is_none(self, base):
        model = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
        with pytest.raises(ConfigError) as caught:
            get_peft_model_state_dict(model, save_embedding_layers="always")
        assert str(caught.value) == "save_embedding_layers must be 'auto', True or False; it is 'always'."

    def test_a_model_that_names_none(self):
        model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
        with pytest.warns(SaveWarning) as caught:
            get_peft_model_state_dict(model, save_embedding_layers=True)
        assert [str(item.message) for item in caught] == [
            (
                "save_embedding_layers=True, but Sequential has no get_input_embeddings() that says which layers are "
                "the embeddings, so none are saved."
            )
        ]

    def test_targeted_says_why(self, base):
        model = get_peft_model(base, LoraConfig(target_modules=["lm_head"]))
        with pytest.warns(SaveWarning) as caught:
            get_peft_model_state_dict(model)
        assert [str(item.message) for item in caught] == [
            (
                "The base model's embeddings are saved with the adapter 'default', because target_modules names them. "
                "Pass save_embedding_layers=False if they are not to be."
            )
        ]

    def test_loading_below_what_is_merged(self, base, tmp_path):
        get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["q_proj"])).save_pretrained(
            tmp_path, save_embedding_layers=True
        )
        model = get_peft_model(base, LoraConfig(target_modules=["lm_head"], init_lora_weights=False), adapter_name="b")
        model.merge_adapter()
        before = Snapshot.of(model)
        with pytest.raises(AdapterStateError) as caught:
            model.load_adapter(tmp_path, "default")
        assert str(caught.value) == (
            "The checkpoint holds the weight of 'lm_head', into which 'b' is merged. Call unmerge_adapter() first."
        )
        assert before.differences(model) == []


def test_merged_is_saved_as_it_was(base):
    """In PEFT the merged weight is saved, and the adapter, loaded on it, counts twice."""
    config = LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    own = base.lm_head.weight.detach().clone()
    for library, given, same in ((tunerkit, config, True), (peft, peft_config(config), False)):
        model = library.get_peft_model(copy.deepcopy(base), given)
        model.merge_adapter()
        state = library.get_peft_model_state_dict(model, save_embedding_layers=True)
        assert torch.equal(state["base_model.model.lm_head.base_layer.weight"], own) == same


def test_a_copied_embedding_is_saved_once(base, tmp_path):
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    theirs = moved(peft.get_peft_model(copy.deepcopy(base), peft_config(config)).eval())
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    ours = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_close(run(ours, INPUTS), run(theirs, INPUTS))
    keys = get_peft_model_state_dict(ours, save_embedding_layers=True)
    assert [key for key in keys if "embed" in key or "head" in key] == [
        "base_model.model.model.embed_tokens.weight",
        "base_model.model.lm_head.weight",
    ]


def test_an_injected_adapter(base):
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), base)
    state = get_peft_model_state_dict(base, save_embedding_layers=True)
    assert {key for key in state if "lora" not in key} == {"model.embed_tokens.weight", "lm_head.weight"}


class Pictures(nn.Module):
    """Has transformers' calls for embeddings and no answer to them, as its models of images."""

    def __init__(self):
        super().__init__()
        self.config = types.SimpleNamespace(tie_word_embeddings=True, to_dict=dict)
        self.head = nn.Linear(3, 2)

    def get_input_embeddings(self):
        raise NotImplementedError

    get_output_embeddings = get_input_embeddings

    def forward(self, x):
        return self.head(x)


def test_a_model_that_does_not_know_its_embeddings_is_saved_and_merged(tmp_path):
    model = get_peft_model(Pictures(), LoraConfig(r=2, target_modules="all-linear"))
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(Pictures(), tmp_path)
    assert type(model.merge_and_unload().head) is nn.Linear
