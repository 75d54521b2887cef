from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tunerkit import naming
from tunerkit.errors import AdapterNameError, ConfigError

ids = st.from_regex(r"[a-z0-9]{1,24}(-[a-z0-9]{1,24}){0,3}", fullmatch=True).filter(
    lambda text: not text.startswith("tunerkit-")
)


class TestMethodNames:
    @given(ids)
    def test_all_spellings_name_one_method(self, method):
        spellings = [
            method,
            naming.package_name(method),
            naming.module_name(method),
            naming.peft_type_name(method),
            f"  {method.upper()}\n",
        ]
        assert {naming.method_id(spelling) for spelling in spellings} == {method}
        for spelling in spellings:
            assert naming.package_name(spelling) == f"tunerkit-{method}"
            assert naming.module_name(spelling) == naming.package_name(method).replace("-", "_")
            assert naming.peft_type_name(spelling) == naming.peft_type_name(method)

    @given(ids)
    def test_what_each_spelling_may_be(self, method):
        assert naming.module_name(method).isidentifier()
        assert re.fullmatch(r"[A-Z0-9_]+", naming.peft_type_name(method))

    @given(ids, ids)
    def test_different_methods_stay_different(self, one, other):
        assume(one != other)
        for spell in (naming.package_name, naming.module_name, naming.peft_type_name):
            assert spell(one) != spell(other)

    def test_example(self):
        assert naming.method_id("LN_TUNING") == "ln-tuning"
        assert naming.package_name("LN_TUNING") == "tunerkit-ln-tuning"
        assert naming.module_name("ln-tuning") == "tunerkit_ln_tuning"
        assert naming.peft_type_name("tunerkit_ln_tuning") == "LN_TUNING"

    @given(st.text())
    def test_any_text_gives_an_id_or_an_error(self, text):
        folded = text.strip().lower().replace("_", "-").removeprefix("tunerkit-")
        if re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", folded):
            assert naming.method_id(text) == folded
            return
        with pytest.raises(ConfigError) as caught:
            naming.method_id(text)
        assert str(caught.value).startswith(f"{text!r} is not a method name: use letters, digits and single hyphens")

    @pytest.mark.parametrize("text", ["", " ", "-", "a--b", "a-", "-a", "a b", "a.b", "a/b", "ä", "tunerkit-", "a\nb"])
    def test_what_is_no_name(self, text):
        with pytest.raises(ConfigError, match="is not a method name"):
            naming.method_id(text)


class TestAdapterNames:
    @given(st.text(min_size=1, max_size=100))
    def test_any_text_is_taken_or_refused_by_its_characters(self, name):
        bad = [char for char in name if char in "./\\" or unicodedata.category(char)[0] == "C"]
        if not bad:
            assert naming.check_adapter_name(name) is name
            return
        with pytest.raises(AdapterNameError) as caught:
            naming.check_adapter_name(name)
        assert str(caught.value).startswith(
            f"The adapter name {name!r} holds {', '.join(map(repr, sorted(set(bad))))}. "
        )
        assert "use letters, digits, spaces, '-' or '_'." in str(caught.value)

    @pytest.mark.parametrize("name", ["default", "weight", "0", "a b", "lora_A", "ä", "模型", "a" * 100])
    def test_legal(self, name):
        assert naming.check_adapter_name(name, reserved=["keys"]) == name

    @pytest.mark.parametrize(
        ("name", "msg"),
        [
            (3, r"An adapter name is a string; 3 is of type int\."),
            (None, r"An adapter name is a string; None is of type NoneType\."),
            ("", r"An adapter name has 1 to 100 characters; '' has 0\."),
            ("a" * 101, r"An adapter name has 1 to 100 characters; 'a{20}' has 101\."),
            ("keys", r"'keys' cannot be an adapter name: it is an attribute of the containers .* such as 'keys_1'\."),
        ],
    )
    def test_refused(self, name, msg):
        with pytest.raises(AdapterNameError, match=msg):
            naming.check_adapter_name(name, reserved=("keys",))


class TestClosest:
    def test_best_first_and_each_once(self):
        assert naming.closest("q_prj", ["k_proj", "q_proj", "q_proj", "mlp"]) == ["q_proj", "k_proj"]

    def test_count(self):
        assert naming.closest("ab", ["abc", "abd", "abe"], count=1) == ["abe"]

    def test_nothing_like_it(self):
        assert naming.closest("zzz", ["abc"]) == []

    @given(st.text(max_size=20), st.lists(st.text(max_size=20), max_size=8), st.integers(1, 4))
    def test_only_possible_names(self, name, possible, count):
        found = naming.closest(name, iter(possible), count)
        assert len(found) <= count
        assert len(set(found)) == len(found)
        assert set(found) <= set(possible)
        if name and name in possible:
            assert found[0] == name


class TestListing:
    @pytest.mark.parametrize(
        ("names", "text"),
        [
            ([], "none"),
            (["a"], "'a'"),
            (["a", 1], "'a', '1'"),
            ("abcdefgh", "'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'"),
            ("abcdefghij", "'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h' and 2 more"),
        ],
    )
    def test_text(self, names, text):
        assert naming.listing(names) == text

    @given(st.lists(st.integers(), max_size=20), st.integers(1, 10))
    def test_counts_all(self, names, limit):
        text = naming.listing(names, limit)
        rest = int(text.split(" and ")[1].split()[0]) if " and " in text else 0
        assert text.count("'") // 2 + rest == len(names)


class TestUncompiled:
    @pytest.mark.parametrize(
        ("path", "plain"),
        [
            ("", ""),
            ("a.b", "a.b"),
            ("_orig_mod", ""),
            ("_orig_mod.a", "a"),
            ("a._orig_mod", "a"),
            ("a._orig_mod.b._orig_mod.weight", "a.b.weight"),
            ("base_model.model._orig_mod.a", "base_model.model.a"),
            ("my_orig_mod.a", "my_orig_mod.a"),
            ("a.my_orig_mod._orig_mod.weight", "a.my_orig_mod.weight"),
            ("_orig_mod_.a", "_orig_mod_.a"),
        ],
    )
    def test_whole_parts_are_left_out(self, path, plain):
        assert naming.uncompiled(path) == plain
