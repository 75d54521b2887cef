"""The reference is as the source has it, tells every word of the contract, and names a test of each."""

import pytest
from cogapp import Cog
from messages import is_known
from reference import PAGES, description, find, named_tests, read, shown, signature, words_of
from reference.__main__ import START

import tunerkit
from tunerkit.plugins.checks import hook_arguments

SHOWN = shown()
CONTRACT = shown(page for page in PAGES if page.stem != "api")
AGAIN = "run `tox -e reference`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_up_to_date(page):
    assert Cog().main(["cog", "--check", "--diff", "-P", "-p", START, str(page)]) == 0, AGAIN


def words(things):
    return [(path, name) for path, words in things.items() for name in words]


@pytest.mark.parametrize(("path", "name"), words(SHOWN))
def test_a_word_is_documented(path, name):
    thing = find(path)
    assert description(words_of(thing, [name])[name], thing if thing.is_class else None)


@pytest.mark.parametrize(("path", "name"), words(CONTRACT))
def test_a_word_has_a_test(path, name):
    named = named_tests().get(path, {}).get(name, [])
    assert named, "name one in tests/reference/tests.toml"
    assert [test for test in named if not is_known(test)] == []


def test_no_other_word_is_named():
    assert set(words(named_tests())) <= set(words(CONTRACT))


@pytest.mark.parametrize("name", tunerkit.__all__)
def test_everything_public_is_shown(name):
    assert f"tunerkit.{name}" in SHOWN


def test_every_hook_is_shown():
    assert {f"tunerkit.plugins.hooks.{name}" for name in hook_arguments()} <= set(SHOWN)


@pytest.mark.parametrize("name", ["Adapter", "AdditiveAdapter", "Part", "linear"])
def test_everything_that_a_method_writes_is_shown(name):
    assert f"tunerkit.adapter.{name}" in SHOWN


# What is read of the source


def test_signatures_are_exact():
    hook = find("tunerkit.plugins.hooks._check_target_module_exists")
    assert signature(hook).endswith("    key: str,\n) -> str | re.Match[str] | bool | None")
    assert signature(find("tunerkit.adapter.linear")) == (
        "def linear(weight: Tensor, bias: Tensor | None = None, *, trains: bool = True) -> nn.Linear"
    )
    run = words_of(find("tunerkit.sites.Site"))["run"]
    assert signature(run).endswith("bias: Tensor | None, *args: Any, **kwargs: Any) -> Tensor")
    assert signature(words_of(find("tunerkit.sites.Site"))["weight"]) == "@property\ndef weight(self) -> Tensor"


TOY = """
class A(B):
    \"\"\"A.

    Attributes:
        b: In two
            lines.
    \"\"\"

    b: ClassVar[int] = 1
    c = 2

    def __init__(self, d: int, /, *, e=3) -> None:
        self.d = d

    @classmethod
    def f(cls, *args, g: str = "h") -> str:
        \"\"\"F.\"\"\"

    def _private(self): ...
"""


def test_a_word_is_not_told_again_without_a_reason(tmp_path):
    again = """
class A:
    b: ClassVar[int] = 1
    \"\"\"B.\"\"\"
    c: ClassVar[int] = 1
    \"\"\"C.\"\"\"

class D(A):
    \"\"\"D.

    Attributes:
        c: Another.
    \"\"\"
    b: ClassVar[int] = 2
    c: ClassVar[int] = 2
    e: ClassVar[int] = 2
"""
    (tmp_path / "again.py").write_text(again, encoding="utf-8")
    assert list(words_of(read("again", tmp_path)["D"])) == ["c", "e"]


def test_what_is_read_of_a_class(tmp_path):
    (tmp_path / "toy.py").write_text(TOY, encoding="utf-8")
    thing = read("toy", tmp_path)["A"]
    words = words_of(thing)
    assert {name: description(word, thing) for name, word in words.items()} == {
        "b": "In two lines.",
        "c": "",
        "d": "",
        "f": "F.",
    }
    assert signature(thing) == "class A(B):\n    def __init__(self, d: int, /, *, e=3) -> None"
    assert [signature(word) for word in words.values()] == [
        "b: ClassVar[int] = 1",
        "c = 2",
        "d: int",
        "@classmethod\ndef f(cls, *args, g: str = 'h') -> str",
    ]
