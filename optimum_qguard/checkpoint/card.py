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
_SECTION_ID = re.compile(r"[a-z0-9-]+")
_BOM = "\ufeff"
_TAGS = re.compile(r"^tags[ \t]*:[^\n]*(?:\n(?:[ \t\r#\]-][^\n]*)?)*", re.MULTILINE)
_LONGEST_TAGS = 1 << 13


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


class _CardProblem(Exception):
    """Why a card cannot be edited safely."""


def _merge(card: str, section_id: str, markdown: str, tags: Sequence[str], metadata: Mapping[str, Any]) -> str:
    newline = "\r\n" if "\r\n" in card else "\n"
    bom = _BOM if card.startswith(_BOM) else ""
    card = card.removeprefix(_BOM)
    match = _FRONT_MATTER.match(card)
    if match is not None:
        header = match["before"] + _merge_header(match["yaml"], tags, metadata, newline) + match["after"]
        body = card[match.end() :]
    elif _HEADER_BEGIN.match(card):
        raise _CardProblem("its YAML header has no end")
    else:
        header = _merge_header("", tags, metadata, newline)
        header = f"---{newline}{header}---{newline}{newline}" if header else ""
        body = card
    return bom + header + _merge_section(body, section_id, markdown, newline)


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
    expected = old | ({"tags": present + new_tags} if new_tags else {}) | new_metadata
    try:
        kept = repr(_load(merged)) == repr(expected)  # in text NaN equals itself
    except _CardProblem:
        kept = False
    if not kept:
        raise _CardProblem("its YAML header is written in a way that cannot be added to")
    return merged


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


def _dump(content: Mapping[str, Any], newline: str) -> str:
    text: str = yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True, default_flow_style=False)
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
