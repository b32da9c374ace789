"""`BitMap`: which layer gets how many bits.

bitmap = BitMap({"*.mlp.down_proj": 8, "layers.0": 6, "*": 4})
bitmap.average_bits(model)
bitmap.save("map.yaml")
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from torch import nn

from optimum_qguard.checkpoint import atomic_write
from optimum_qguard.precision.errors import PrecisionError
from optimum_qguard.precision.linears import fused_experts, linear_layers, oriented, output_head, tied_weights

MINIMUM, MAXIMUM = 2, 8
WIDTHS = tuple(range(MINIMUM, MAXIMUM + 1))
SUFFIXES = (".yaml", ".yml", ".json")
_WILDCARD = re.compile(r"[*?\[]")
_NO_MAPPING = "is no bit map: it is one mapping of patterns to bits"


@dataclass(frozen=True, init=False)
class BitMap:
    """Widths by pattern, of which the first that matches a layer decides; a layer that none matches is left as it is.

    A pattern with ``*``, ``?`` or ``[…]`` is a `fnmatch` pattern of the whole dotted name (``*`` goes over dots). One
    without stands for a component of the name or several in a row: ``down_proj``, ``layers.0``, ``mlp.c_proj``, or a
    whole name. The output head has a width only where a pattern without wildcards names it.

    Attributes:
        patterns: pairs of a pattern and bits, 2 to 8, or ``None`` to leave what it matches as it is.

    Raises:
        PrecisionError: no patterns, an empty one, one that stands there twice, bits out of range, or no such pairs.
    """

    patterns: tuple[tuple[str, int | None], ...]

    def __init__(self, patterns: Mapping[str, int | None] | Iterable[tuple[str, int | None]]) -> None:
        given = patterns.items() if isinstance(patterns, Mapping) else patterns
        try:
            pairs = tuple((pattern, bits) for pattern, bits in given)
        except (TypeError, ValueError):
            raise PrecisionError(
                f'{patterns!r} is no bit map: it is patterns and their bits, such as {{"*": 4}}'
            ) from None
        object.__setattr__(self, "patterns", pairs)
        if not self.patterns:
            raise PrecisionError('a bit map without patterns gives no layer a width; {"*": 4} gives all of them 4 bits')
        seen = set()
        for pattern, bits in self.patterns:
            if not isinstance(pattern, str) or not pattern.strip("."):
                raise PrecisionError(f"{pattern!r} is no pattern of module names; give one such as '*.mlp.down_proj'")
            if pattern in seen:
                raise PrecisionError(
                    f"pattern {pattern!r} stands twice in the bit map; the first would decide: keep one"
                )
            seen.add(pattern)
            check_bits(bits, f"pattern {pattern!r}", or_none=True)

    def resolve(self, model: nn.Module) -> dict[str, int | None]:
        """The width of each linear layer, by name in the model's order; the output head is there if it has one.

        Args:
            model: at full precision; it may be on the meta device.

        Raises:
            PrecisionError: a pattern that matches nothing, or with a width no linear layer; fused experts that a width
                was meant for; layers that share a weight and not a width; no linear layers; a quantized model.
        """
        linears, head = linear_layers(model), output_head(model)
        modules = dict(model.named_modules(remove_duplicate=False))
        self._check_experts(model)
        for pattern, bits in self.patterns:
            _check_pattern(pattern, bits, modules, linears)
        widths = {
            name: self._width(name, named_only=module is head)
            for name, module in modules.items()
            if any(module is linear for linear in linears.values())
        }
        _check_shared(model, widths)
        return {
            name: widths[name] for name, module in linears.items() if module is not head or widths[name] is not None
        }

    def average_bits(self, model: nn.Module) -> float:
        """``Σ bits · weights / Σ weights`` over the linear layers that have a width. Scales are not counted.

        Raises:
            PrecisionError: no layer has a width, or see `resolve`.
        """
        linears = linear_layers(model)
        sizes = [
            (bits, oriented(linears[name]).numel()) for name, bits in self.resolve(model).items() if bits is not None
        ]
        if not sizes:
            raise PrecisionError("the bit map leaves every layer as it is, so it has no average")
        return sum(bits * size for bits, size in sizes) / sum(size for _, size in sizes)

    def to_dict(self) -> dict[str, int | None]:
        """The patterns in their order; ``BitMap.from_dict(b.to_dict()) == b``."""
        return dict(self.patterns)

    @classmethod
    def from_dict(cls, content: Mapping[str, int | None]) -> BitMap:
        """A bit map of what `to_dict` gave.

        Raises:
            PrecisionError: see the class.
        """
        return cls(content)

    def save(self, path: str | Path) -> None:
        """Write a ``.yaml``, ``.yml`` or ``.json`` file; ``BitMap.load(path) == b`` afterwards.

        Raises:
            PrecisionError: another suffix.
            CheckpointError: the file cannot be written.
        """
        path = check_suffix(path)
        content = self.to_dict()
        if path.suffix == ".json":
            atomic_write(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        else:
            atomic_write(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))

    @classmethod
    def load(cls, path: str | Path) -> BitMap:
        """Read what `save` wrote, or what was written by hand: one mapping of patterns to bits.

        Raises:
            PrecisionError: not readable, no such mapping, or see the class.
        """
        path = check_suffix(path)
        try:
            text = path.read_text(encoding="utf-8")
            return cls(_json_pairs(text) if path.suffix == ".json" else _yaml_pairs(text))
        except (OSError, UnicodeDecodeError) as error:
            raise PrecisionError(f"{path}: cannot be read: {error}") from error
        except json.JSONDecodeError as error:
            raise PrecisionError(f"{path}: is no bit map: it is not JSON ({error})") from error
        except yaml.YAMLError as error:
            what = " ".join(str(error).split())
            raise PrecisionError(
                f"{path}: is no bit map ({what}); it maps patterns to bits, and those that begin with * are in quotes"
            ) from error
        except PrecisionError as error:
            raise PrecisionError(f"{path}: {error}") from error
        except (ValueError, RecursionError) as error:  # a date that does not exist, brackets without end
            raise PrecisionError(f"{path}: is no bit map ({error}); it maps patterns to bits") from error

    def _width(self, name: str, *, named_only: bool) -> int | None:
        for pattern, bits in self.patterns:
            if matches(pattern, name) and not (named_only and _WILDCARD.search(pattern)):
                return bits
        return None

    def _check_experts(self, model: nn.Module) -> None:
        for name, parameters in fused_experts(model):
            for pattern, bits in self.patterns:
                if not any(matches(pattern, each) for each in (name, *parameters)):
                    continue
                if bits is not None:
                    raise PrecisionError(
                        f"pattern {pattern!r} covers {name}, whose experts' weights are fused into one tensor, which "
                        f"is not supported: put {name!r}, or a pattern for all such, with null before it to leave them"
                    )
                break


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern of a `BitMap` matches a dotted module name."""
    if _WILDCARD.search(pattern):
        return fnmatch.fnmatchcase(name, pattern)
    return f".{pattern.strip('.')}." in f".{name}."


def check_bits(bits: Any, what: str, *, or_none: bool = False) -> None:
    """Raise `PrecisionError` unless ``bits`` is a width; ``what`` has it."""
    if or_none and bits is None:
        return
    if isinstance(bits, bool) or not isinstance(bits, int) or not MINIMUM <= bits <= MAXIMUM:
        none = ", or null to leave a layer as it is" if or_none else ""
        raise PrecisionError(f"{what} has {bits!r} bits; a width is a whole number from {MINIMUM} to {MAXIMUM}{none}")


def check_suffix(path: str | Path) -> Path:
    """The path, if a bit map can have it.

    Raises:
        PrecisionError: another suffix.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise PrecisionError(f"{path}: the name of a bit map's file ends in one of {', '.join(SUFFIXES)}")
    return path


def _json_pairs(text: str) -> list[tuple[Any, Any]]:
    """What a JSON object holds, keys that stand there twice included."""
    pairs = json.loads(text, object_pairs_hook=_Pairs)
    if not isinstance(pairs, _Pairs):
        raise PrecisionError(_NO_MAPPING)
    return pairs


class _Pairs(list[tuple[Any, Any]]):
    """A JSON object, to tell it from a list."""


def _yaml_pairs(text: str) -> list[tuple[Any, Any]]:
    """What a YAML mapping holds, keys that stand there twice included."""
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise PrecisionError(_NO_MAPPING)
        return [(loader.construct_object(key, True), loader.construct_object(value, True)) for key, value in root.value]
    finally:
        loader.dispose()


def _check_pattern(
    pattern: str, bits: int | None, modules: Mapping[str, nn.Module], linears: Mapping[str, nn.Module]
) -> None:
    matched = [name for name in modules if name and matches(pattern, name)]
    if not matched:
        raise PrecisionError(f"pattern {pattern!r} matches no module of the model{_nearest(pattern, linears)}")
    if bits is not None and not any(modules[name] is linear for name in matched for linear in linears.values()):
        raise PrecisionError(
            f"pattern {pattern!r} gives a width to {matched[0]}, which is a {type(modules[matched[0]]).__name__}: only "
            "linear layers can have one"
        )


def _check_shared(model: nn.Module, widths: Mapping[str, int | None]) -> None:
    for names in tied_weights(model):
        one, other = (widths.get(name.removesuffix(".weight")) for name in names)
        if one != other:
            raise PrecisionError(
                f"{names[0]} and {names[1]} are one and the same tensor, but would have different widths: "
                f"{one or 'none'} and {other or 'none'}"
            )


def _nearest(pattern: str, linears: Mapping[str, nn.Module]) -> str:
    """A hint for a pattern that matches nothing."""
    import difflib

    last = pattern.rpartition(".")[2]
    kinds = sorted({name.rpartition(".")[2] for name in linears})
    close = difflib.get_close_matches(last, kinds, 1)
    return f"; its linear layers are called {', '.join(kinds)}" + (f" (did you mean {close[0]}?)" if close else "")
