from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tunerkit.checkpoint import card as cards
from tunerkit.checkpoint.card import Card, render, update, write_card
from tunerkit.checkpoint.writing import write_checkpoint

yaml = pytest.importorskip("yaml", reason="the head is read back with it")

CARD = Card(
    title="Adapters for org/name",
    text="What it is.",
    base_model="org/name",
    pipeline_tag="text-generation",
    tags=("base_model:adapter:org/name", "short"),
    versions={"tunerkit": "0.1.0", "tunerkit-x": "2.0"},
)

NEW = """\
---
library_name: peft
base_model: org/name
pipeline_tag: text-generation
tags:
- base_model:adapter:org/name
- short
---

# Adapters for org/name

What it is.

### Framework versions

- tunerkit 0.1.0
- tunerkit-x 2.0
"""


def head_of(text):
    return yaml.safe_load(text.split("---")[1])


def updated(head, card=CARD):
    """Update a card with this head and return what its head says then, after seeing to it that once is enough."""
    text = update(f"---\n{head}\n---\nBody.\n", card)
    assert update(text, card) == text
    return head_of(text)


def test_new():
    assert render(CARD) == NEW
    assert update(NEW, CARD) == NEW


def test_with_nothing_to_say():
    assert render(Card(title="Adapters", text="What it is.")) == (
        "---\nlibrary_name: peft\n---\n\n# Adapters\n\nWhat it is.\n\n### Framework versions\n\n"
    )


THEIRS = """\
---
# My own notes
license: mit   # chosen with care
tags:
  - "short"   # it is
  - mine
model-index:
- name: x
  results: [ {task: a} ]
base_model: other/name
language:
- en

---
# Mine

Text with --- in it.

### Framework versions

- Transformers 4.0
- tunerkit 0.0.9
- PEFT 0.21.2

## End
"""

OURS = """\
---
# My own notes
license: mit   # chosen with care
tags:
  - "short"   # it is
  - mine
  - base_model:adapter:org/name
model-index:
- name: x
  results: [ {task: a} ]
base_model: org/name
language:
- en

library_name: peft
pipeline_tag: text-generation
---
# Mine

Text with --- in it.

### Framework versions

- tunerkit 0.1.0
- tunerkit-x 2.0
- Transformers 4.0
- PEFT 0.21.2

## End
"""


def test_what_is_not_ours_stays():
    assert update(THEIRS, CARD) == OURS
    assert update(OURS, CARD) == OURS


def test_without_a_head():
    text = update("# Mine\n\n---\n\nText.", CARD)
    assert text == NEW.replace("# Adapters for org/name\n\nWhat it is.", "# Mine\n\n---\n\nText.")
    assert update("", Card("a", "b")).startswith("---\nlibrary_name: peft\n---\n\n### Framework versions")


def test_empty_head():
    text = update("---\n---\nText.\n", CARD)
    assert head_of(text) == head_of(NEW)
    assert "\nText.\n" in text


@pytest.mark.parametrize(
    ("head", "tags"),
    [
        ("tags: []", []),
        ("tags:", []),
        ("tags: null", []),
        ("tags: ~  # none yet", []),
        ("tags: one", ["one"]),
        ("tags: 'one'", ["one"]),
        ("tags: [one, 'two']  # both", ["one", "two"]),
        ("tags: [one,\n  two,\n]", ["one", "two"]),
        ("tags: [\n  one\n  ]", ["one"]),
        ("tags:\n- one\n- two\nlicense: mit", ["one", "two"]),
        ("tags:\n\n  # mine\n  - one\n\n# more\nlicense: mit", ["one"]),
        ("other: [tags]", []),
        ("other:\n  tags: no", []),
    ],
)
def test_tags_in_any_form(head, tags):
    assert updated(head)["tags"] == [*tags, *CARD.tags]


@pytest.mark.parametrize(
    "head", ["tags: [short, 'base_model:adapter:org/name']", 'tags:\n- short\n- "base_model:adapter:org/name"']
)
def test_tags_that_are_there(head):
    assert update(f"---\n{head}\n---\n", CARD).startswith(f"---\n{head}\nlibrary_name")


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("base_model: other", "org/name"),
        ("base_model: 'org/name'", "org/name"),
        ("base_model:\n- other\n- org/name", ["other", "org/name"]),
        ("base_model: [other, org/name]", ["other", "org/name"]),
        ("base_model:\n  - other", "org/name"),
        ("license: mit", "org/name"),
    ],
)
def test_base_model(head, expected):
    assert updated(head)["base_model"] == expected
    assert updated("base_model: other", Card("a", "b"))["base_model"] == "other"


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("pipeline_tag: feature-extraction", "feature-extraction"),
        ("pipeline_tag:\n  feature-extraction", "feature-extraction"),
        ("pipeline_tag:", "text-generation"),
        ("pipeline_tag: null", "text-generation"),
        ("license: mit", "text-generation"),
    ],
)
def test_pipeline_tag_is_the_authors(head, expected):
    assert updated(head)["pipeline_tag"] == expected


TEXTS = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=12)


@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=4, unique=True))
def test_any_text_is_read_back(name, tags):
    head = (
        head_of(render(Card("a", "b", base_model=name, tags=tuple(tags))).replace("---", "---", 1))
        if ("---" not in name + "".join(tags))
        else None
    )
    if head is not None:
        assert head["base_model"] == name
        assert head["tags"] == tags


@pytest.mark.parametrize(
    "text", ["true", "No", "null", "1.5", "2024-01-01", "a: b", "a #b", "", "- a", "[a]", "~", "ä/ö"]
)
def test_texts_that_mean_something_else_in_yaml(text):
    head = head_of(render(Card("a", "b", base_model=text, tags=(text,))))
    assert (head["base_model"], head["tags"]) == (text, [text])


class TestWriting:
    def test_new_and_again(self, tmp_path):
        write_card(tmp_path, CARD)
        assert (tmp_path / "README.md").read_text(encoding="utf-8") == NEW
        before = (tmp_path / "README.md").stat()
        write_card(tmp_path, CARD)
        assert (tmp_path / "README.md").stat().st_ino == before.st_ino
        assert [path.name for path in tmp_path.iterdir()] == ["README.md"]

    def test_line_ends_stay(self, tmp_path):
        (tmp_path / "README.md").write_bytes(THEIRS.replace("\n", "\r\n").encode())
        write_card(tmp_path, CARD)
        assert (tmp_path / "README.md").read_bytes() == OURS.replace("\n", "\r\n").encode()

    @pytest.mark.parametrize("where", ["fsync", "replace"])
    def test_cut_leaves_the_old_one(self, tmp_path, monkeypatch, where):
        (tmp_path / "README.md").write_text(THEIRS, encoding="utf-8")

        def fail(*arguments):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(*((os, "fsync") if where == "fsync" else (Path, "replace")), fail)
        with pytest.raises(OSError, match="No space left"):
            write_card(tmp_path, CARD)
        assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
        assert (tmp_path / "README.md").read_text(encoding="utf-8") == THEIRS

    def test_not_text(self, tmp_path):
        (tmp_path / "README.md").write_bytes(b"\xff\xfe")
        with pytest.raises(UnicodeDecodeError):
            write_card(tmp_path, CARD)
        assert (tmp_path / "README.md").read_bytes() == b"\xff\xfe"

    def test_what_a_killed_save_left_goes_with_the_next(self, tmp_path):
        old, young = (tmp_path / f"README.md.{digit * 32}.tmp" for digit in "ab")
        for path in (old, young):
            path.write_text("half", encoding="utf-8")
        os.utime(old, (0, 0))
        write_checkpoint(tmp_path, {"peft_type": "X"}, {"a": torch.zeros(1)}, {})
        assert not old.exists()
        assert young.exists()

    def test_library_is_the_formats(self):
        assert cards.LIBRARY == "peft"
