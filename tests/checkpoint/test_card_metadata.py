"""Metadata and results in a card's header, and cards merged with each other."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from optimum_qguard.checkpoint import CheckpointError
from optimum_qguard.checkpoint.card import described_card, merged_cards

SOURCE = {"name": "optimum-qguard", "url": "https://example.org"}


def result(value: float, **more: Any) -> dict[str, Any]:
    metrics = [{"type": "kl", "value": value}]
    return {"task": {"type": "t"}, "dataset": {"type": "d", "name": "d"}, "metrics": metrics, **more}


OURS = result(1.0, source=SOURCE)
THEIRS = result(2.0)


def header(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return found


def described(card: str, **options: Any) -> str:
    arguments: dict[str, Any] = {"metadata": {}, "own": {"qguard": {"method": "encrypt"}}} | options
    once = described_card(card, **arguments)
    assert described_card(once, **arguments) == once
    return once


@pytest.mark.parametrize(
    "block",
    [
        "qguard:\n  method: guard\n  parameters:\n    a: [1,\n      2]\n",
        "qguard: {method: guard}   # theirs\n",
        "qguard:\n",
        "qguard: |\n  text\n\n  more\n",
        "qguard:\n- a\n- b: c\n",
        "",
    ],
)
@pytest.mark.parametrize("after", ["# a comment\nlicense: mit   # kept\n", ""])
def test_our_own_block_is_replaced_and_nothing_else(block: str, after: str) -> None:
    card = f"---\n# first\nlanguage:\n  - no\n{block}{after}---\n# Text\n"
    ours = "qguard:\n  method: encrypt\n"
    wanted = f"{ours}{after}" if block else f"{after}{ours}"
    assert described(card) == f"---\n# first\nlanguage:\n  - no\n{wanted}---\n# Text\n"


def test_line_ends_stay() -> None:
    card = described("---\r\nqguard:\r\n  a: 1\r\nb: 2\r\n---\r\ntext\r\n")
    assert card == "---\r\nqguard:\r\n  method: encrypt\r\nb: 2\r\n---\r\ntext\r\n"


@pytest.mark.parametrize(
    "index",
    [
        [{"name": "m", "results": [THEIRS]}],
        [{"name": "m", "results": [THEIRS, OURS | result(9.0), THEIRS]}],
        [{"name": "m", "results": [OURS | result(9.0)]}],
        [{"name": "m", "results": []}],
        [{"name": "m", "results": [THEIRS], "more": 1}, {"name": "n", "results": [THEIRS]}],
        [],
        None,
    ],
)
@pytest.mark.parametrize("flow", [True, None, False])
def test_results_are_added_to_those_that_are_there(index: Any, flow: bool | None) -> None:
    index = json.loads(json.dumps(index))  # no object twice, which would become an alias
    text = yaml.safe_dump({"model-index": index, "after": 1}, sort_keys=False, default_flow_style=flow)
    try:
        card = described(f"---\n{text}---\n", own={}, results=[OURS], model_name="m")
    except CheckpointError:
        assert text.startswith("{")  # a header in braces cannot be added to
        return
    theirs = [found for found in (index or [{"results": []}])[0]["results"] if found.get("source") != SOURCE]
    assert header(card)["model-index"][0]["results"] == [*theirs, OURS]
    assert header(card)["model-index"][1:] == (index or [])[1:]
    assert header(card)["after"] == 1


def test_comments_between_results_stay() -> None:
    card = described(
        "---\nmodel-index:\n  - name: m   # a\n    results:\n      - task: {type: t}   # b\n        metrics: []\n"
        "# c\nz: 1\n---\n",
        own={},
        results=[OURS],
    )
    assert "name: m   # a\n" in card
    assert "- task: {type: t}   # b\n" in card
    assert "# c\nz: 1\n" in card
    assert header(card)["model-index"][0]["results"] == [{"task": {"type": "t"}, "metrics": []}, OURS]


@pytest.mark.parametrize("index", ["3", "[3]", "{a: b}", "[{name: m}]"])
def test_an_index_that_makes_no_sense(index: str) -> None:
    with pytest.raises(CheckpointError, match="no list of models with results"):
        described_card(f"---\nmodel-index: {index}\n---\n", metadata={}, own={}, results=[OURS])


def test_anchors_that_others_need_are_not_broken() -> None:
    card = "---\nqguard: &a\n  x: 1\nother: *a\n---\n"
    with pytest.raises(CheckpointError, match="cannot be added to"):
        described_card(card, metadata={}, own={"qguard": 2})


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.text(max_size=5), values, max_size=4), st.sampled_from([True, False, None]), st.booleans())
def test_any_header(metadata: dict[str, Any], flow: bool | None, indent: bool) -> None:
    """Whatever stands there means the same afterwards, or the card is refused."""
    style = {"default_flow_style": flow, "allow_unicode": True, "indent": 4 if indent else 2, "sort_keys": False}
    text = yaml.safe_dump(metadata | {"qguard": 1}, **style)
    before = yaml.safe_load(text)  # the library itself loses some of what it is given, such as "\x85"
    try:
        card = described_card(f"---\n{text}---\nbody\n", metadata={}, own={"qguard": {"a": [1]}}, results=[OURS])
    except CheckpointError:
        return
    after = yaml.safe_load(card[4 : card.index("\n---\n")])
    assert after.pop("model-index")[0]["results"][-1] == OURS
    assert repr(sorted(after.items())) == repr(sorted((before | {"qguard": {"a": [1]}}).items()))
    assert card.endswith("---\nbody\n")


SECTION = "<!-- qguard:encrypt begin -->\n{}\n<!-- qguard:encrypt end -->\n"
PRESENT = f"---\nlicense: mit   # theirs\ntags: [a]\n---\n# Theirs\n\n{SECTION.format('old')}end\n"
NEW = f"---\nlicense: apache\nbase_model: b\ntags:\n- q\n---\n# Ours\n\n{SECTION.format('new')}"


def test_two_cards() -> None:
    merged = merged_cards(PRESENT, NEW)
    wanted = PRESENT.replace("[a]", "[a, q]\nbase_model: b").replace("old", "new")
    assert merged == wanted
    assert merged_cards(merged, NEW) == merged


def test_a_card_without_text_takes_the_others() -> None:
    assert merged_cards("", NEW) == NEW
    assert merged_cards(" \n", NEW) == NEW
    assert merged_cards("---\na: 1\n---\n", NEW).endswith("# Ours\n\n" + NEW.partition("# Ours\n\n")[2])
    assert merged_cards(PRESENT, "") == PRESENT
    assert merged_cards("# Text\n", NEW).startswith("---\ntags:\n- q\nlicense: apache\nbase_model: b\n---\n\n# Text\n")


def test_a_card_that_cannot_be_merged() -> None:
    for present, new in [("---\na: [\n---\n", NEW), (PRESENT, "---\na: [\n---\n"), (PRESENT, "---\na: 1\n")]:
        with pytest.raises(CheckpointError, match=r"README\.md: its YAML header"):
            merged_cards(present, new)
