"""The core's answers to the hooks, as a plugin that adds to them calls them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from torch import nn

from tunerkit import Method, PeftConfig
from tunerkit.adapter import Adapter
from tunerkit.defaults import fill_target_modules, find_site
from tunerkit.errors import TargetError, UnsupportedSiteError
from tunerkit.sites import LinearSite


@dataclass
class Config(PeftConfig):
    peft_type: str | None = "DEFAULTS_TOY"
    target_modules: list[str] | str | None = None


class TestFindSite:
    method = Method(config=Config, adapter=Adapter)

    def test_of_a_kind_that_the_method_adapts(self):
        layer = nn.Linear(2, 3)
        site = find_site(self.method, Config(), layer, "block.fc", None)
        assert (type(site), site.module, site.name) == (LinearSite, layer, "block.fc")

    def test_of_another_kind(self):
        with pytest.raises(UnsupportedSiteError, match="'words' is a Embedding, and 'defaults-toy' adapts linear"):
            find_site(self.method, Config(), nn.Embedding(3, 2), "words", None)


class TestFillTargetModules:
    mapping = {"llama": ["q_proj"], "gemma": "q.*"}  # noqa: RUF012 - read only

    @pytest.mark.parametrize(("model_type", "targets"), [("llama", {"q_proj"}), ("gemma", "q.*")])
    def test_by_the_models_type(self, model_type, targets):
        config = Config()
        assert fill_target_modules(config, {"model_type": model_type}, self.mapping, "toy") is config
        assert config.target_modules == targets

    def test_what_is_chosen_stays(self):
        config = fill_target_modules(Config(target_modules=["fc"]), {"model_type": "llama"}, self.mapping, "toy")
        assert list(config.target_modules) == ["fc"]

    def test_another_type(self):
        with pytest.raises(TargetError, match="'toy' has no default for models of the type 'bert'"):
            fill_target_modules(Config(), {"model_type": "bert"}, self.mapping, "toy")
