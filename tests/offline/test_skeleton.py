from __future__ import annotations

import json

import pytest
from transformers import BertForSequenceClassification, BertModel, LlamaForCausalLM

from tunerkit.errors import CheckpointError
from tunerkit.offline.skeleton import open_skeleton


def config_of(folder):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def test_it_holds_no_data(llama, saved):
    skeleton = open_skeleton(saved(llama()), {}, [])
    assert type(skeleton.model) is LlamaForCausalLM
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


@pytest.mark.parametrize(
    ("adapter", "paths", "kind"),
    [
        ({}, ["encoder.layer.0"], BertModel),
        ({"auto_mapping": {"base_model_class": "BertForSequenceClassification"}}, ["classifier"],
         BertForSequenceClassification),
        ({"task_type": "SEQ_CLS"}, ["classifier"], BertForSequenceClassification),
        # Classes that are none of transformers', none of this model's, or no names of classes at all.
        ({"auto_mapping": {"base_model_class": "AutoConfig"}, "task_type": "NONE"}, ["encoder.layer.0"], BertModel),
        ({"auto_mapping": {"base_model_class": "LlamaModel"}, "task_type": 3}, ["encoder.layer.0"], BertModel),
        ({"auto_mapping": {"base_model_class": None}}, ["encoder.layer.0"], BertModel),
        ({"auto_mapping": "x"}, ["encoder.layer.0"], BertModel),
        # None has it: the one that has the most.
        ({"task_type": "SEQ_CLS"}, ["classifier", "nowhere"], BertForSequenceClassification),
    ],
)  # fmt: skip
def test_the_class_is_the_one_that_the_adapter_was_made_for(saved, bert_config, adapter, paths, kind):
    assert type(open_skeleton(saved(BertModel(bert_config)), adapter, paths).model) is kind


def test_no_class(saved, tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "siglip_text_model", "architectures": ["Nix"]}', encoding="utf-8"
    )
    from transformers import AutoModel, SiglipTextConfig

    if AutoModel._model_mapping.get(SiglipTextConfig, None) is not None:
        pytest.skip("this config has a model class of its own")
    with pytest.raises(CheckpointError, match=r"no model class for .*architectures: 'Nix'"):
        open_skeleton(tmp_path, {}, [])


def test_names(llama, saved):
    names = open_skeleton(saved(llama(tied=True)), {}, []).names()
    assert names.aliases["lm_head.weight"] == ("model.embed_tokens.weight", "lm_head.weight")
    assert names.parameter("model.norm.weight") == ("model.norm.weight", False)
    # Files of the bare model have no prefix.
    assert names.parameter("norm.weight") == ("model.norm.weight", False)
    assert names.parameter("nowhere.weight") == ("nowhere.weight", False)


def test_a_key_that_the_model_has_as_it_is_keeps_its_name(llama, saved, monkeypatch):
    from transformers import conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    folder = saved(llama())
    renamings = [WeightRenaming("norm.weight", "old.weight"), WeightRenaming("head.weight", "lm_head.weight")]
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda _: renamings)
    names = open_skeleton(folder, {}, []).names()
    assert names.parameter("model.norm.weight") == ("model.norm.weight", False)
    assert names.parameter("head.weight") == ("lm_head.weight", False)


def test_a_config_that_says_more_than_that_nothing_is_tied(llama, saved):
    folder = saved(llama(tied=True))
    skeleton = open_skeleton(folder, {}, [])
    values = {**config_of(folder), "tie_word_embeddings": False}
    assert skeleton.untied(values).names().aliases["lm_head.weight"] == ("lm_head.weight",)
    with pytest.raises(
        CheckpointError, match="LlamaConfig also changes 'hidden_act', so the merged model would compute"
    ):
        skeleton.untied({**values, "hidden_act": "gelu"})


def test_ties_of_a_config_within_the_config(tmp_path):
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"model_type": "llama", "vocab_size": 32, "num_key_value_heads": 2, "tie_word_embeddings": True, **sizes}
    vision = {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, **sizes}
    LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    ).save_pretrained(tmp_path)
    skeleton = open_skeleton(tmp_path, {}, [])
    values = config_of(tmp_path)
    values["tie_word_embeddings"] = values["text_config"]["tie_word_embeddings"] = False
    assert skeleton.untied(values).names().aliases["lm_head.weight"] == ("lm_head.weight",)
