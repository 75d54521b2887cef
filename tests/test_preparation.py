from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from tunerkit import cast_mixed_precision_params, get_peft_model, prepare_model_for_kbit_training
from tunerkit.errors import AdapterStateError, ConfigError, KeywordWarning
from tunerkit.testing.bench import move
from tunerkit_ia3 import IA3Config
from tunerkit_lora import LoraConfig

IDS = torch.arange(12).reshape(2, 6)


def make_llama(seed=0):
    transformers = pytest.importorskip("transformers", reason="real gradient checkpointing is transformers'")
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, use_cache=False
    )
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config)


def enable(model, **options):
    """Switch checkpointing on and nothing else, by the name that this version of transformers has for it."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
        model.disable_input_require_grads()  # which version 5 enables along with it
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def lora(**others):
    return LoraConfig(target_modules=["q_proj", "down_proj"], r=2, **others)


def gradients(model):
    model.train()
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


CONFIGS = {"lora": lora, "ia3": lambda: IA3Config(target_modules=["q_proj"], feedforward_modules=[])}


class TestGradientCheckpointing:
    @pytest.mark.parametrize("reentrant", [True, False])
    @pytest.mark.parametrize("method", CONFIGS)
    @pytest.mark.parametrize("when", ["before", "after"])
    def test_gradients_are_the_same(self, method, reentrant, when):
        plain = get_peft_model(make_llama(), CONFIGS[method]())
        move(plain, "default")
        expected = gradients(plain)
        base = make_llama()
        if when == "before":
            enable(base, use_reentrant=reentrant)
        model = get_peft_model(base, CONFIGS[method]())
        if when == "after":
            enable(model, use_reentrant=reentrant)
            model.enable_input_require_grads()
        move(model, "default")
        found = gradients(model)
        assert expected.keys() == found.keys()
        assert all(gradient.abs().max() > 1e-7 for gradient in expected.values())
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)

    def test_without_preparation_there_are_none(self):
        """What the tests above rest on: re-entrant checkpointing needs an input that needs a gradient."""
        model = get_peft_model(make_llama(), lora())
        enable(model, use_reentrant=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(RuntimeError, match="does not require grad"):
                gradients(model)

    def test_nothing_stays_hooked(self):
        base = make_llama()
        enable(base)
        for _ in range(2):
            model = get_peft_model(base, lora())
            assert len(base.get_input_embeddings()._forward_hooks) == 1
            model.unload()
            assert not base.get_input_embeddings()._forward_hooks

    def test_nothing_is_hooked_where_it_is_off(self):
        base = make_llama()
        get_peft_model(base, lora())
        assert not base.get_input_embeddings()._forward_hooks

    @pytest.mark.parametrize("flag", ["is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized"])
    def test_quantised_models_are_left_alone(self, flag):
        base = make_llama()
        setattr(base, flag, True)
        enable(base)
        model = get_peft_model(base, lora())
        assert not base.get_input_embeddings()._forward_hooks
        setattr(base, flag, False)
        model.prepare_model_for_gradient_checkpointing(base)
        assert len(base.get_input_embeddings()._forward_hooks) == 1


class Plain(nn.Module):
    """A model that is not transformers' and says which its input embeddings are."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(16, 4)
        self.lin = nn.Linear(4, 4)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, ids):
        return self.lin(self.embed(ids))


class TestPlainModels:
    def test_get_a_hook_as_in_peft(self):
        peft = pytest.importorskip("peft", reason="comparing with PEFT needs it")
        mine, theirs = Plain(), Plain()
        get_peft_model(mine, LoraConfig(target_modules=["lin"], r=2))
        peft.get_peft_model(theirs, peft.LoraConfig(target_modules=["lin"], r=2))
        assert len(mine.embed._forward_hooks) == len(theirs.embed._forward_hooks) == 1
        assert mine.embed(IDS).requires_grad
        with torch.no_grad():
            mine(IDS)

    def test_that_say_they_do_not_checkpoint_get_none(self):
        base = Plain()
        base.is_gradient_checkpointing = False
        get_peft_model(base, LoraConfig(target_modules=["lin"], r=2))
        assert not base.embed._forward_hooks

    def test_nothing_is_left_if_it_fails(self, monkeypatch):
        base = Plain()

        def fail():
            base.embed.register_forward_hook(print)
            raise KeyboardInterrupt

        monkeypatch.setattr(base, "enable_input_require_grads", fail, raising=False)
        with pytest.raises(KeyboardInterrupt):
            get_peft_model(base, LoraConfig(target_modules=["lin"], r=2))
        assert type(base.lin) is nn.Linear
        assert base.lin.weight.requires_grad
        assert not base.embed._forward_hooks

    def test_the_hook_goes_with_the_last_adapter(self):
        base = Plain()
        config = LoraConfig(target_modules=["lin"], r=2)
        for take_out in ("unload", "merge_and_unload"):
            model = get_peft_model(base, config)
            assert len(base.embed._forward_hooks) == 1
            assert getattr(model, take_out)() is base
            assert not base.embed._forward_hooks
        model = get_peft_model(base, config)
        model.add_adapter("two", config)
        model.set_adapter("two")
        model.delete_adapter("default")
        assert len(base.embed._forward_hooks) == 1
        copied = copy.deepcopy(model)
        for each in (model, copied):
            each.delete_adapter("two")
            assert not each.get_base_model().embed._forward_hooks
            each.add_adapter("three", config)
            assert len(each.get_base_model().embed._forward_hooks) == 1

    def test_hooks_of_others_stay(self):
        base = Plain()
        base.embed.register_forward_hook(lambda *_: None)
        model = get_peft_model(base, LoraConfig(target_modules=["lin"], r=2))
        base.embed.register_forward_hook(lambda *_: None)
        model.unload()
        assert len(base.embed._forward_hooks) == 2

    def test_without_embeddings_nothing_happens(self):
        model = get_peft_model(nn.Sequential(nn.Linear(3, 3)), LoraConfig(target_modules=["0"], r=2))
        model._prepare_model_for_gradient_checkpointing(model.get_base_model())
        assert not any(module._forward_hooks for module in model.modules())


class TestKbitTraining:
    def states(self, model):
        return {name: (p.dtype, p.requires_grad) for name, p in model.named_parameters()}

    @pytest.mark.parametrize(
        "marks", [{}, {"is_loaded_in_4bit": True}, {"quantization_method": "gptq"}, {"hqq_quantized": True}]
    )
    @pytest.mark.parametrize("options", [None, {"use_reentrant": False}])
    def test_does_what_peft_does(self, marks, options):
        peft = pytest.importorskip("peft", reason="comparing with PEFT needs it")
        mine, theirs = make_llama().bfloat16(), make_llama().bfloat16()
        for model in (mine, theirs):
            for name, value in marks.items():
                setattr(model, name, value)
        assert prepare_model_for_kbit_training(mine, gradient_checkpointing_kwargs=options) is mine
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            peft.prepare_model_for_kbit_training(theirs, gradient_checkpointing_kwargs=options)
        assert self.states(mine) == self.states(theirs)
        hooks = [len(model.get_input_embeddings()._forward_hooks) for model in (mine, theirs)]
        assert hooks[0] == hooks[1]
        assert bool(hooks[0]) == bool(marks)
        layers = [model.model.layers[0].gradient_checkpointing for model in (mine, theirs)]
        assert layers == [bool(marks)] * 2

    def test_tensors_of_four_bits_stay(self):
        class Params4bit(nn.Parameter):
            pass

        model = nn.Linear(3, 3).bfloat16()
        model.weight = Params4bit(model.weight.data)
        prepare_model_for_kbit_training(model, auto_clear_cache=False)
        assert (model.weight.dtype, model.bias.dtype) == (torch.bfloat16, torch.float32)
        assert not model.weight.requires_grad

    def test_cache_is_cleared(self, monkeypatch):
        cleared = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: cleared.append("cuda"))
        prepare_model_for_kbit_training(nn.Linear(3, 3), auto_clear_cache=False)
        assert cleared == []
        prepare_model_for_kbit_training(nn.Linear(3, 3))
        assert cleared == ["cuda"]

    def test_older_models_take_no_arguments(self):
        class Old(Plain):
            is_loaded_in_8bit = True
            enabled = 0

            def gradient_checkpointing_enable(self):
                self.enabled += 1

        model = Old()
        prepare_model_for_kbit_training(model)
        assert model.enabled == 1
        with pytest.warns(KeywordWarning, match="gradient_checkpointing_kwargs has no effect: the model's"):
            prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
        assert model.enabled == 2
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        assert model.enabled == 2

    def test_models_that_do_not_say_where_their_embeddings_are(self):
        class Bare(nn.Linear):
            is_loaded_in_8bit = True
            enabled = 0

            def gradient_checkpointing_enable(self):
                self.enabled += 1

        model = Bare(3, 3)
        prepare_model_for_kbit_training(model)
        assert model.enabled == 1
        assert not model._forward_hooks

    def test_no_checkpointing_to_switch_on(self):
        model = Plain().bfloat16()
        model.is_loaded_in_8bit = True
        with pytest.raises(
            ConfigError, match=r"Plain has no gradient checkpointing .* use_gradient_checkpointing=False"
        ):
            prepare_model_for_kbit_training(model)
        assert model.lin.weight.dtype is torch.bfloat16
        assert model.lin.weight.requires_grad


class TestCastMixedPrecision:
    def test_is_pefts(self):
        peft = pytest.importorskip("peft", reason="comparing with PEFT needs it")
        mine = get_peft_model(nn.Sequential(nn.Linear(3, 3)).double(), LoraConfig(target_modules=["0"], r=2))
        theirs = peft.get_peft_model(
            nn.Sequential(nn.Linear(3, 3)).double(), peft.LoraConfig(target_modules=["0"], r=2)
        )
        before = list(mine.parameters())
        cast_mixed_precision_params(mine, torch.bfloat16)
        peft.cast_mixed_precision_params(theirs, torch.bfloat16)
        assert {n: p.dtype for n, p in mine.named_parameters()} == {n: p.dtype for n, p in theirs.named_parameters()}
        assert {p.dtype for p in mine.parameters()} == {torch.float32, torch.bfloat16}
        assert all(one is other for one, other in zip(before, mine.parameters(), strict=True))
        assert mine(torch.ones(1, 3, dtype=torch.bfloat16)).dtype is torch.bfloat16

    def test_integers_stay(self):
        """PEFT makes numbers of them."""
        peft = pytest.importorskip("peft", reason="comparing with PEFT needs it")
        for cast, expected in (
            (cast_mixed_precision_params, torch.uint8),
            (peft.cast_mixed_precision_params, torch.float16),
        ):
            model = nn.Linear(3, 3)
            model.weight = nn.Parameter(torch.ones(3, dtype=torch.uint8), requires_grad=False)
            cast(model, torch.float16)
            assert model.weight.dtype is expected

    def test_of_a_merged_model_which_peft_casts(self):
        """What unmerging gives back there is not what would have been cast."""
        peft = pytest.importorskip("peft", reason="comparing with PEFT needs it")
        theirs = peft.get_peft_model(nn.Sequential(nn.Linear(3, 3)), peft.LoraConfig(target_modules=["0"], r=2))
        torch.nn.init.normal_(theirs.base_model.model[0].lora_B["default"].weight)
        before = theirs.base_model.model[0].weight.detach().bfloat16()
        theirs.merge_adapter()
        peft.cast_mixed_precision_params(theirs, torch.bfloat16)
        theirs.unmerge_adapter()
        assert not torch.equal(theirs.base_model.model[0].weight, before)

    def test_refusals(self):
        model = get_peft_model(nn.Sequential(nn.Linear(3, 3)), LoraConfig(target_modules=["0"], r=2))
        for wrong in (torch.int8, "bfloat16"):
            with pytest.raises(
                ConfigError, match=r"dtype must be one of floating-point numbers, such as torch.bfloat16; it"
            ):
                cast_mixed_precision_params(model, wrong)
        model.merge_adapter()
        with pytest.raises(AdapterStateError, match=r"would not be cast. Call unmerge_adapter\(\) first."):
            cast_mixed_precision_params(model, torch.float16)


def test_copies_are_prepared_too():
    base = make_llama()
    enable(base, use_reentrant=True)
    model = copy.deepcopy(get_peft_model(base, lora()))
    assert gradients(model)
