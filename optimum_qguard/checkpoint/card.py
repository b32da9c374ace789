"""Merges a section, tags and metadata into a model card without touching anything else in it.

The card is edited as text. Reading and writing it through ``huggingface_hub.ModelCard`` would lose YAML comments,
quoting and null values, and turns ``license: no`` into ``false``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from optimum_qguard.checkpoint.atomic import atomic_write
from optimum_qguard.checkpoint.errors import CheckpointError

CARD_FILE = "README.md"

_HEADER_BEGIN = re.compile(r"\s*---[ \t]*\r?\n")
_FRONT_MATTER = re.compile(
    rf"(?P<before>{_HEADER_BEGIN.pattern})(?P<yaml>.*?)(?P<after>^---[ \t]*(?:\r?\n|\Z))", re.DOTALL | re.MULTILINE
)
_TAGS = re.compile(r"^tags[ \t]*:[^\n]*(?:\n(?:[ \t\r#\]-][^\n]*)?)*", re.MULTILINE)
_LONGEST_TAGS = 1 << 13
_SECTION_ID = re.compile(r"[a-z0-9-]+")
_SECTION = re.compile(
    r"<!-- qguard:(?P<id>[a-z0-9-]+) begin -->\r?\n(?P<text>.*?)<!-- qguard:(?P=id) end -->", re.DOTALL
)
_RESULTS_KEY = "model-index"
_BOM = "\ufeff"


def merge_card(
    folder: str | Path,
    *,
    section_id: str,
    markdown: str,
    tags: Sequence[str],
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Put a section into ``README.md``, and tags and metadata into its YAML header; make the card if there is none.

    What is there already stays, byte for byte: the text, comments, order and style of the YAML, line ends. Merging the
    same again changes nothing.

    Args:
        folder: where the card is.
        section_id: the section stands between the comments ``<!-- qguard:section_id begin -->`` and ``... end -->``.
            It is replaced where it stands, or appended.
        markdown: the section's text.
        tags: appended to the card's tags, each once.
        metadata: added where the card does not have the key yet; existing values win.

    Raises:
        CheckpointError: the card is not UTF-8, its YAML header or its section markers are broken; the file is left
            alone.
    """
    path = Path(folder) / CARD_FILE
    try:
        before = path.read_bytes().decode() if path.exists() else ""
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); convert it") from error
    try:
        after = _merge(before, section_id, markdown, tags, metadata or {})
    except _CardProblem as problem:
        raise CheckpointError(f"{path}: {problem}; correct it by hand or remove it") from problem
    if after != before:
        atomic_write(path, after)


def merged_cards(present: str, new: str) -> str:
    """A card with another one's sections, tags and metadata put into it as `merge_card` does; and with the other one's
    text where it has none of its own.

    Raises:
        CheckpointError: one of them cannot be edited safely.
    """
    if not present.strip():
        return new
    try:
        header, body = _split(new.removeprefix(_BOM))
        metadata = _load(header or "")
        tags = metadata.pop("tags", None) or []
        merged = _with_header(present, [tags] if isinstance(tags, str) else tags, metadata, {}, [], "")
        if not _split(merged.removeprefix(_BOM))[1].strip():
            return merged + body
        for section in _SECTION.finditer(body):
            merged = _merge(merged, section["id"], section["text"], [], {})
    except _CardProblem as problem:
        raise CheckpointError(f"{CARD_FILE}: {problem}; correct it by hand") from problem
    return merged


def described_card(
    card: str,
    *,
    tags: Sequence[str] = (),
    metadata: Mapping[str, Any],
    own: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]] = (),
    model_name: str = "",
) -> str:
    """A card with tags, metadata and results in its YAML header. All else stays, byte for byte.

    Args:
        card: the whole text.
        tags: appended to the card's tags, each once.
        metadata: added where the card does not have the key yet.
        own: added, or put in place of what stands under these keys.
        results: of an evaluation, as in the ``results`` of ``model-index``; those there that have the same ``source``
            are replaced, all others stay.
        model_name: what ``model-index`` calls the model if it is new.

    Raises:
        CheckpointError: the card cannot be edited safely.
    """
    try:
        return _with_header(card, tags, metadata, own, results, model_name)
    except _CardProblem as problem:
        raise CheckpointError(f"{CARD_FILE}: {problem}; correct it by hand") from problem


def card_tags(card: str) -> list[str]:
    """The tags in a card's YAML header, of which nothing is believed: only this entry is parsed, and one that is broken
    or longer than tags are has none."""
    match = _FRONT_MATTER.match(card.removeprefix(_BOM))
    entry = _TAGS.search(match["yaml"]) if match is not None else None
    if entry is None or len(entry[0]) > _LONGEST_TAGS:
        return []
    try:
        tags = yaml.safe_load(entry[0])["tags"]
    except (yaml.YAMLError, RecursionError, TypeError, KeyError, ValueError):
        return []
    tags = [tags] if isinstance(tags, str) else tags
    return [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []


class _CardProblem(Exception):
    """Why a card cannot be edited safely."""


def _newline(card: str) -> str:
    return "\r\n" if "\r\n" in card else "\n"


def _split(card: str) -> tuple[str | None, str]:
    """YAML header (``None`` if there is none) and text."""
    match = _FRONT_MATTER.match(card)
    if match is not None:
        return match["yaml"], card[match.end() :]
    if _HEADER_BEGIN.match(card):
        raise _CardProblem("its YAML header has no end")
    return None, card


def _merge(card: str, section_id: str, markdown: str, tags: Sequence[str], metadata: Mapping[str, Any]) -> str:
    newline = _newline(card)
    card = _with_header(card, tags, metadata, {}, [], "")
    body = _split(card.removeprefix(_BOM))[1]
    return card[: len(card) - len(body)] + _merge_section(body, section_id, markdown, newline)


def _with_header(
    card: str,
    tags: Sequence[str],
    metadata: Mapping[str, Any],
    own: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    model_name: str,
) -> str:
    newline = _newline(card)
    bom = _BOM if card.startswith(_BOM) else ""
    card = card.removeprefix(_BOM)
    present, body = _split(card)
    header = _merge_header(present or "", tags, metadata, newline)
    for key, value in own.items():
        header = _set(header, key, value, newline)
    if results:
        header = _add_results(header, results, model_name, newline)
    if present is None:
        return bom + (f"---{newline}{header}---{newline}{newline}" if header else "") + body
    match = _FRONT_MATTER.match(card)
    assert match is not None
    return bom + match["before"] + header + match["after"] + body


def _set(header: str, key: str, value: Any, newline: str) -> str:
    """``header`` with a value under a key, in place of the one that is there."""
    old = _load(header)
    if key in old and old[key] == value:
        return header
    start, stop = _entry(header, key)
    before = _with_final_newline(header[:start], newline)
    return _checked(before + _dump({key: value}, newline) + header[stop:], old | {key: value})


def _entry(header: str, key: str) -> tuple[int, int]:
    """Where the lines of a key begin and end; the end of ``header`` twice if it is not there."""
    root = yaml.compose(header, Loader=yaml.SafeLoader)
    found = [pair for pair in root.value if pair[0].value == key] if root is not None else []
    if not found:
        return len(header), len(header)
    name, value = found[-1]
    return _line(header, name.start_mark.index), _line_end(header, max(_end(value), name.end_mark.index))


def _end(node: Any) -> int:
    """Where the text of a node ends; the parser says of a block only where the next thing begins."""
    if isinstance(node, yaml.ScalarNode) or node.flow_style or not node.value:
        end: int = node.end_mark.index
        return end
    last = node.value[-1]
    return _end(last[1] if isinstance(node, yaml.MappingNode) else last)


def _line(text: str, at: int) -> int:
    return text.rfind("\n", 0, at) + 1


def _line_end(text: str, at: int) -> int:
    if at and text[at - 1] == "\n":  # a block scalar's end
        return at
    end = text.find("\n", at)
    return len(text) if end < 0 else end + 1


def _add_results(header: str, results: Sequence[Mapping[str, Any]], model_name: str, newline: str) -> str:
    old = _load(header)
    index = old.get(_RESULTS_KEY)
    if index is None or index == []:
        return _set(header, _RESULTS_KEY, [{"name": model_name, "results": list(results)}], newline)
    if not (isinstance(index, list) and isinstance(index[0], dict) and isinstance(index[0].get("results"), list)):
        raise _CardProblem(f"the {_RESULTS_KEY} in its YAML header is no list of models with results")
    sources = [result["source"] for result in results]
    ours = [isinstance(item, dict) and item.get("source") in sources for item in index[0]["results"]]
    if [item for item, mine in zip(index[0]["results"], ours, strict=True) if mine] == list(results):
        return header
    kept = [item for item, mine in zip(index[0]["results"], ours, strict=True) if not mine]
    merged = [{**index[0], "results": [*kept, *results]}, *index[1:]]
    root = yaml.compose(header, Loader=yaml.SafeLoader)
    node = next(value for key, value in reversed(root.value) if key.value == _RESULTS_KEY)
    items = next(value for key, value in node.value[0].value if key.value == "results")
    if items.flow_style or not kept:
        return _set(header, _RESULTS_KEY, merged, newline)
    text = header[: _line_end(header, _end(items.value[-1]))]
    text = _with_final_newline(text, newline)
    indent = " " * items.start_mark.column
    lines = _dump(list(results), newline).splitlines(keepends=True)
    added = text + "".join(indent + line for line in lines) + header[len(text) :]
    for item, mine in reversed(list(zip(items.value, ours, strict=True))):
        if mine:
            added = added[: _line(added, item.start_mark.index)] + added[_line_end(added, _end(item)) :]
    return _checked(added, old | {_RESULTS_KEY: merged})


def _text_of(metadata: Mapping[str, Any]) -> str:
    """To compare by, whatever the order of keys: in text NaN equals itself."""
    return repr(sorted(metadata.items(), key=lambda pair: repr(pair[0])))


def _checked(header: str, expected: Mapping[str, Any]) -> str:
    """``header``, if it means what was intended."""
    try:
        kept = _text_of(_load(header)) == _text_of(expected)
    except _CardProblem:
        kept = False
    if not kept:
        raise _CardProblem("its YAML header is written in a way that cannot be added to")
    return header


def _merge_section(body: str, section_id: str, markdown: str, newline: str) -> str:
    if not _SECTION_ID.fullmatch(section_id):
        raise ValueError(f"section_id {section_id!r}: only lower-case letters, digits and hyphens")
    begin, end = f"<!-- qguard:{section_id} begin -->", f"<!-- qguard:{section_id} end -->"
    if begin in markdown or end in markdown:
        raise ValueError(f"the section's text contains its own marker {begin} or {end}")
    section = newline.join([begin, *markdown.strip("\r\n").splitlines(), end])
    if begin not in body and end not in body:
        body = _with_final_newline(body, newline)
        separator = newline if body.strip() and not body.endswith(newline * 2) else ""
        return body + separator + section + newline
    start, stop = body.find(begin), body.find(end)
    if (body.count(begin), body.count(end)) != (1, 1) or start > stop:
        raise _CardProblem(f"the markers {begin} and {end} do not stand there once each, in this order")
    return body[:start] + section + body[stop + len(end) :]


def _merge_header(header: str, tags: Sequence[str], metadata: Mapping[str, Any], newline: str) -> str:
    old = _load(header)
    present = old.get("tags")
    if not (present is None or isinstance(present, str | list)):
        raise _CardProblem("the tags in its YAML header are neither a list nor a word")
    present = [present] if isinstance(present, str) else present or []
    new_tags = [tag for tag in dict.fromkeys(tags) if tag not in present]
    new_metadata = {key: value for key, value in metadata.items() if key not in old and key != "tags"}
    merged = _insert_tags(header, new_tags, newline) if new_tags else header
    if new_metadata:
        merged = _with_final_newline(merged, newline) + _dump(new_metadata, newline)
    return _checked(merged, old | ({"tags": present + new_tags} if new_tags else {}) | new_metadata)


def _insert_tags(header: str, tags: list[str], newline: str) -> str:
    """``header`` with ``tags`` (not empty) added to its tags, in the style that they are written in."""
    root = yaml.compose(header, Loader=yaml.SafeLoader)
    values = [value for key, value in root.value if key.value == "tags"] if root is not None else []
    if not values:
        return _with_final_newline(header, newline) + _dump({"tags": tags}, newline)
    node = values[-1]
    items = [_inline(tag) for tag in tags]
    start, end = node.start_mark.index, node.end_mark.index
    if isinstance(node, yaml.ScalarNode):
        text = header[start:end]
        inline = ", ".join(items if node.tag.endswith(":null") else [_inline(node.value), *items])
        return f"{header[:start]}{'' if text else ' '}[{inline}]{header[end:]}"
    if node.flow_style:
        at = node.value[-1].end_mark.index if node.value else start + 1
        return header[:at] + ", ".join([""] * bool(node.value) + items) + header[at:]
    line_end = header.find("\n", node.value[-1].end_mark.index)
    above, below = (header, "") if line_end < 0 else (header[: line_end + 1], header[line_end + 1 :])
    indent = " " * node.start_mark.column
    return _with_final_newline(above, newline) + "".join(f"{indent}- {item}{newline}" for item in items) + below


def _inline(tag: str) -> str:
    text: str = yaml.safe_dump([tag], allow_unicode=True, default_flow_style=True, width=math.inf)
    return text.strip()[1:-1]


def _with_final_newline(text: str, newline: str) -> str:
    return text if not text or text.endswith("\n") else text + newline


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Writes what occurs twice twice, so that either can be edited."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _dump(content: Mapping[str, Any] | Sequence[Any], newline: str) -> str:
    text: str = yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False)
    return text.replace("\n", newline)


def _load(header: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(header)
    except yaml.YAMLError as error:
        raise _CardProblem(f"its YAML header is broken ({' '.join(str(error).split())})") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise _CardProblem("its YAML header is not a mapping")
    return content
