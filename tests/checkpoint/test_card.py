from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optimum_qguard.checkpoint import CheckpointError, merge_card

SECTION = "## Guarded\n\n½ größer, |seed| hidden"
BLOCK = "<!-- qguard:guard begin -->\n" + SECTION + "\n<!-- qguard:guard end -->"


def merge(folder: Path, card: str | None = None, **options: Any) -> str:
    path = folder / "README.md"
    if card is not None:
        path.write_bytes(card.encode())
    arguments = {"section_id": "guard", "markdown": SECTION, "tags": ["quantization-guarded", "qguard"]} | options
    merge_card(folder, **arguments)
    once = path.read_bytes()
    merge_card(folder, **arguments)
    assert path.read_bytes() == once
    assert [file.name for file in folder.iterdir()] == ["README.md"]
    return once.decode()


def metadata(card: str) -> dict[str, Any]:
    return ModelCard(card.removeprefix("\ufeff")).data.to_dict()


def test_a_new_card(tmp_path: Path) -> None:
    card = merge(tmp_path, metadata={"base_model": "org/model"})
    assert card == f"---\ntags:\n- quantization-guarded\n- qguard\nbase_model: org/model\n---\n\n{BLOCK}\n"


def test_text_without_a_header(tmp_path: Path) -> None:
    card = merge(tmp_path, "# Mine\n\ntext")
    assert card == f"---\ntags:\n- quantization-guarded\n- qguard\n---\n\n# Mine\n\ntext\n\n{BLOCK}\n"
    assert merge(tmp_path, "# Mine\n", tags=[]) == f"# Mine\n\n{BLOCK}\n"


RICH = """---
# kept by hand
language:
  - no   # Norwegian
license: no
version: 1.10
empty:
unknown: {b: 1, a: [x, 'y']}
date: 2024-01-02
title: "Größe 模型"
tags:
  - text-generation
  - qguard   # ours, already
model-index:
- name: m
  results: []
---
# Title

<!-- other comment --> body
"""


def test_everything_else_is_kept(tmp_path: Path) -> None:
    card = merge(tmp_path, RICH, metadata={"license": "mit", "base_model": "org/model"})
    expected = RICH.replace("already\n", "already\n  - quantization-guarded\n")
    expected = expected.replace("results: []\n", "results: []\nbase_model: org/model\n")
    assert card == f"{expected}\n{BLOCK}\n"
    assert metadata(card)["tags"] == ["text-generation", "qguard", "quantization-guarded"]


def test_the_section_is_replaced_where_it_stands(tmp_path: Path) -> None:
    merge(tmp_path, "# Mine\n")
    with (tmp_path / "README.md").open("a") as file:
        file.write("\n## After\n")
    other = merge(tmp_path, section_id="scan", markdown="clean")
    changed = merge(tmp_path, markdown="new\n")
    assert changed == other.replace(SECTION, "new")
    assert "<!-- qguard:scan begin -->\nclean\n<!-- qguard:scan end -->" in changed


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("tags: [a, b]", "tags: [a, b, t]"),
        ("tags: [a, b,]", "tags: [a, b, t,]"),
        ("tags: [a,\n  b  # why\n  ]", "tags: [a,\n  b, t  # why\n  ]"),
        ("tags: []", "tags: [t]"),
        ("tags: a", "tags: [a, t]"),
        ("tags: 'a b'  # c", "tags: [a b, t]  # c"),
        ("tags:", "tags: [t]"),
        ("tags: null", "tags: [t]"),
        ("tags:\n- a", "tags:\n- a\n- t"),
        ("tags:\n    - a\n\n# end\nx: 1", "tags:\n    - a\n    - t\n\n# end\nx: 1"),
        ("x: 1", "x: 1\ntags:\n- t"),
        ("", "tags:\n- t"),
        ("tags: [t, a]", "tags: [t, a]"),
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_styles_of_tags(tmp_path: Path, written: str, expected: str, newline: str) -> None:
    def card(header: str, body: str) -> str:
        return f"---\n{header}\n---\n{body}".replace("---\n\n---", "---\n---").replace("\n", newline)

    merged = merge(tmp_path, card(written, "body\n"), tags=["t"])
    assert merged == card(expected, f"body\n\n{BLOCK}\n")


def test_byte_order_mark(tmp_path: Path) -> None:
    card = merge(tmp_path, "\ufeff---\nlicense: mit\n---\nbody\n")
    assert card.startswith("\ufeff---\nlicense: mit\ntags:\n")
    assert card.count("\ufeff") == 1


@pytest.mark.parametrize(
    ("card", "reason"),
    [
        ("---\na: [1\n---\n", "YAML header is broken"),
        ("---\n- a\n---\n", "not a mapping"),
        ("---\na: 1\nbody", "no end"),
        ("---\ntags: {a: 1}\n---\n", "neither a list nor a word"),
        ("---\n{a: 1}\n---\n", "cannot be added to"),
        ("---\ntags: &t [a]\nx: *t\n---\n", "cannot be added to"),
        ("---\na: 1\n---\n<!-- qguard:guard begin -->\n", "markers"),
        ("---\na: 1\n---\n<!-- qguard:guard end --><!-- qguard:guard begin -->", "markers"),
        ("<!-- qguard:guard begin --><!-- qguard:guard end -->" * 2, "markers"),
    ],
)
def test_a_broken_card_is_left_alone(tmp_path: Path, card: str, reason: str) -> None:
    path = tmp_path / "README.md"
    path.write_text(card)
    with pytest.raises(CheckpointError, match=reason) as caught:
        merge_card(tmp_path, section_id="guard", markdown=SECTION, tags=["t"])
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert path.read_text() == card


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"caf\xe9")
    with pytest.raises(CheckpointError, match="not UTF-8"):
        merge_card(tmp_path, section_id="guard", markdown=SECTION, tags=["t"])
    assert (tmp_path / "README.md").read_bytes() == b"caf\xe9"


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="section_id"):
        merge_card(tmp_path, section_id="a b", markdown="x", tags=[])
    with pytest.raises(ValueError, match="marker"):
        merge_card(tmp_path, section_id="a", markdown="<!-- qguard:a end -->", tags=[])
    assert not list(tmp_path.iterdir())


WORDS = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\u2028\u2029\ufeff\ufffe\uffff"), max_size=8
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=5,
)


@given(
    st.dictionaries(WORDS.filter(lambda key: key != "tags"), VALUES, max_size=4),
    st.none() | WORDS | st.lists(WORDS, max_size=3),
    st.lists(WORDS.filter(bool), max_size=3),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), max_size=30),
    st.sampled_from([True, False, None]),
)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_card(
    tmp_path: Path, data: dict[str, Any], present: Any, tags: list[str], body: str, flow: bool | None
) -> None:
    header = yaml.safe_dump(data | {"tags": present}, sort_keys=False, allow_unicode=True, default_flow_style=flow)
    card = f"---\n{header}---\n{body}"
    merged = merge(tmp_path, card, tags=tags)
    merged_header = merged.split("\n---\n")[0].removeprefix("---\n")
    old_tags = [present] if isinstance(present, str) else present or []
    expected = data | {"tags": old_tags + [tag for tag in dict.fromkeys(tags) if tag not in old_tags]}
    loaded = yaml.safe_load(merged_header)
    if tags and expected["tags"] != old_tags:
        assert repr(loaded) == repr(expected)
    else:
        assert merged.startswith(f"---\n{header}---\n")
    assert f"\n---\n{body}" in merged
    assert merged.endswith(BLOCK + "\n")
