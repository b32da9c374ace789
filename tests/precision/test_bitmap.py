"""Which layer gets how many bits: matching, validation against a model, averages, files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_model
from torch import nn

from optimum_qguard.precision.bitmap import BitMap, matches
from optimum_qguard.precision.errors import PrecisionError

PATTERNS = st.text(st.sampled_from("ab*?[].:'\"# é-0"), min_size=1).filter(lambda text: text.strip("."))
MAPS = st.dictionaries(PATTERNS, st.none() | st.integers(2, 8), min_size=1).map(BitMap)


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("*.mlp.down_proj", "model.layers.0.mlp.down_proj", True),
        ("*.mlp", "model.layers.0.mlp.down_proj", False),
        ("*", "lm_head", True),
        ("model.layers.[01].*", "model.layers.1.mlp.down_proj", True),
        ("model.layers.?.*", "model.layers.11.mlp.down_proj", False),
        ("down_proj", "model.layers.0.mlp.down_proj", True),
        ("down", "model.layers.0.mlp.down_proj", False),
        ("layers.1", "model.layers.1.mlp.down_proj", True),
        ("layers.1", "model.layers.11.mlp.down_proj", False),
        ("mlp.down_proj", "model.layers.1.mlp.down_proj", True),
        ("model.layers.1.mlp.down_proj", "model.layers.1.mlp.down_proj", True),
        ("DOWN_PROJ", "model.layers.0.mlp.down_proj", False),
    ],
)
def test_matching(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


def test_the_first_match_decides_and_the_rest_is_left_alone() -> None:
    model = tiny_model("llama")
    widths = BitMap({"layers.0.mlp.down_proj": 8, "q_proj": None, "*.self_attn.*": 3, "layers.0": 6}).resolve(model)
    assert list(widths) == [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][:-1]
    assert widths["model.layers.0.mlp.down_proj"] == 8
    assert widths["model.layers.0.self_attn.q_proj"] is None
    assert widths["model.layers.1.self_attn.k_proj"] == 3
    assert widths["model.layers.0.mlp.up_proj"] == 6
    assert widths["model.layers.1.mlp.up_proj"] is None


def test_the_output_head_must_be_named() -> None:
    model = tiny_model("llama")
    assert "lm_head" not in BitMap({"*": 4}).resolve(model)
    assert BitMap({"lm_head": 8, "*": 4}).resolve(model)["lm_head"] == 8
    assert BitMap({"*": 4, "lm_head": 8}).resolve(model)["lm_head"] == 8


def test_layers_of_gpt2() -> None:
    model = tiny_model("gpt2")
    widths = BitMap({"mlp.c_proj": 8, "*": 4}).resolve(model)
    assert {name for name, bits in widths.items() if bits == 8} == {f"transformer.h.{i}.mlp.c_proj" for i in (0, 1)}
    assert len(widths) == 8


def test_average_bits_is_weighted_by_weights() -> None:
    model = tiny_model("llama")
    bitmap = BitMap({"*.down_proj": 8, "q_proj": None, "*": 3})
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    pairs = [(bits, linears[name].weight.numel()) for name, bits in bitmap.resolve(model).items() if bits]
    assert bitmap.average_bits(model) == sum(bits * n for bits, n in pairs) / sum(n for _, n in pairs)
    assert BitMap({"*": 5}).average_bits(model) == 5


@given(MAPS)
def test_dict_round_trip(bitmap: BitMap) -> None:
    assert BitMap.from_dict(bitmap.to_dict()) == bitmap


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json"])
def test_file_round_trip(suffix: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("maps") / f"map{suffix}"

    @given(MAPS)
    def round_trip(bitmap: BitMap) -> None:
        bitmap.save(path)
        assert BitMap.load(path) == bitmap

    round_trip()


def test_order_counts() -> None:
    assert BitMap({"a": 4, "b": 8}) != BitMap({"b": 8, "a": 4})


@pytest.mark.parametrize(
    ("patterns", "says"),
    [
        ({}, "without patterns"),
        ({"*": 1}, "pattern '\\*' has 1 bits; a width is a whole number from 2 to 8, or null"),
        ({"*": 9}, "has 9 bits"),
        ({"*": 4.0}, "has 4.0 bits"),
        ({"*": True}, "has True bits"),
        ({"*": "4"}, "has '4' bits"),
        ({".": 4}, "'.' is no pattern"),
        ([("*", 4), ("*", 5)], "pattern '\\*' stands twice"),
    ],
)
def test_bad_maps(patterns: dict[str, int], says: str) -> None:
    with pytest.raises(PrecisionError, match=rf"^[^\n]*{says}[^\n]*$"):
        BitMap(patterns)


@pytest.mark.parametrize(
    ("name", "patterns", "says"),
    [
        ("llama", {"down_prj": 4}, r"'down_prj' matches no module .*\(did you mean down_proj\?\)"),
        ("llama", {"layers.7": 4, "*": 4}, "'layers.7' matches no module"),
        ("llama", {"embed_tokens": 4}, "gives a width to model.embed_tokens, which is a Embedding"),
        ("llama", {"*norm*": 8, "*": 4}, "input_layernorm, which is a LlamaRMSNorm"),
        ("llama-tied", {"lm_head": 8, "*": 4}, "one and the same tensor, but would have different widths"),
        ("mixtral", {"*": 4}, "covers model.layers.0.mlp.experts, whose experts' weights are fused"),
        ("mixtral", {"gate_up_proj": 4}, "covers model.layers.0.mlp.experts, whose experts' weights are fused"),
    ],
)
def test_what_a_model_does_not_take(name: str, patterns: dict[str, int], says: str) -> None:
    with pytest.raises(PrecisionError, match=rf"^[^\n]*{says}[^\n]*$"):
        BitMap(patterns).resolve(tiny_model(name))


def test_what_has_no_width_may_be_named() -> None:
    widths = BitMap({"embed_tokens": None, "experts": None, "*": 4}).resolve(tiny_model("mixtral"))
    assert set(widths.values()) == {4}
    assert all("self_attn" in name for name in widths)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.again = self.first
        self.second.weight = self.first.weight


def test_shared_layers_have_one_width() -> None:
    assert BitMap({"*": 4}).resolve(Shared()) == {"first": 4, "second": 4}
    for patterns in ({"second": 8, "*": 4}, {"again": 8, "*": 4}, {"first": 4, "second": 4}):
        with pytest.raises(PrecisionError, match=r"^first.weight and \w+.weight are one and the same tensor"):
            BitMap(patterns).resolve(Shared())


def test_nothing_to_quantize() -> None:
    with pytest.raises(PrecisionError, match="has no linear layers"):
        BitMap({"*": 4}).resolve(nn.Sequential(nn.ReLU()))
    with pytest.raises(PrecisionError, match="leaves every layer as it is"):
        BitMap({"*": None}).average_bits(tiny_model("llama"))
    quantized = nn.Sequential(nn.Linear(8, 8))
    quantized[0].weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(PrecisionError, match=r"^0 is quantized already"):
        BitMap({"*": 4}).resolve(quantized)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("*: 4\n", "is no bit map .* in quotes"),
        ("- 4\n", "is no bit map: it is one mapping"),
        ("", "is no bit map: it is one mapping"),
        ("a: 4\nb: [1]\n", r"pattern 'b' has \[1\] bits"),
        ("a: 4\na: 5\n", "pattern 'a' stands twice"),
        ("4: 4\n", "4 is no pattern"),
        ("a: !!python/object:os.system x\n", "is no bit map"),
        ("a: 2001-99-99\n", "is no bit map .month must be in"),
        ("a: !!int x\n", "is no bit map .invalid literal"),
        ("a: " + 5000 * "[", "is no bit map .maximum recursion depth"),
    ],
)
def test_bad_files(content: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "map.yaml"
    path.write_text(content)
    with pytest.raises(PrecisionError, match=rf"^{path}: [^\n]*{says}[^\n]*$"):
        BitMap.load(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(PrecisionError, match="cannot be read"):
        BitMap.load(tmp_path / "none.yaml")
    with pytest.raises(PrecisionError, match=r"ends in one of \.yaml"):
        BitMap({"*": 4}).save(tmp_path / "map.txt")


@pytest.mark.parametrize("content", [100_000 * "[", '{"*": %s}' % (5000 * "4")])
def test_json_that_is_hard_to_read(content: str, tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text(content)
    with pytest.raises(PrecisionError, match=rf"^{path}: is no bit map"):
        BitMap.load(path)


def test_json_is_plain_json(tmp_path: Path) -> None:
    BitMap({"*.mlp": 8, "*": None}).save(tmp_path / "map.json")
    assert json.loads((tmp_path / "map.json").read_text()) == {"*.mlp": 8, "*": None}


def test_json_is_read_as_json(tmp_path: Path) -> None:
    """As editors indent it, with tabs, which YAML does not allow; and a pattern that stands twice is seen."""
    path = tmp_path / "map.json"
    path.write_text('{\n\t"*.mlp":\t8,\n\t"*": null\n}\n')
    assert BitMap.load(path) == BitMap({"*.mlp": 8, "*": None})
    for text, says in [
        ('{"*": 4, "*": 8}', "stands twice"),
        ('{"*": 4,}', "is no bit map: it is not JSON"),
        ('[["*", 4]]', "it is one mapping of patterns to bits"),
        ("[]", "it is one mapping of patterns to bits"),
        ("{}", "without patterns"),
        ('{"*": {"bits": 4}}', "pattern '\\*' has .* bits; a width is a whole number"),
    ]:
        path.write_text(text)
        with pytest.raises(PrecisionError, match=says) as caught:
            BitMap.load(path)
        assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("patterns", [4, None, ["*"], [("*", 4, 8)], [4]])
def test_what_is_no_map_at_all(patterns: Any) -> None:
    with pytest.raises(PrecisionError, match="is no bit map: it is patterns and their bits"):
        BitMap(patterns)
