"""Where rows and columns of heads lie, checked on the computation that they come from."""

from types import SimpleNamespace

import pytest
import torch

from optimum_qguard.encrypt.architectures import ArchitectureError
from optimum_qguard.encrypt.layouts import Grouped, Heads, Layer, Separate, Stacked, rotary_pairs
from optimum_qguard.encrypt.sites import Norm, QueryKey, UpDown, ValueOutput

HEADS = Heads(queries=6, groups=2, size=8)


def layer(shapes: dict[str, tuple[int, ...]], **config: object) -> Layer:
    return Layer("layers.0.", SimpleNamespace(model_type="test", **config), HEADS, shapes)


def test_rotary_pairs() -> None:
    assert rotary_pairs(6, 4, "half").tolist() == [0, 1, 0, 1, 2, 3]
    assert rotary_pairs(6, 4, "interleaved").tolist() == [0, 0, 1, 1, 2, 3]
    assert rotary_pairs(6, 0, "half").tolist() == rotary_pairs(6, 4, "none").tolist() == [0, 1, 2, 3, 4, 5]


def test_query_heads_of_a_group_follow_each_other() -> None:
    assert HEADS.per_query(torch.tensor([[7], [9]])).flatten().tolist() == [7, 7, 7, 9, 9, 9]
    with pytest.raises(ArchitectureError, match="5 query heads cannot share 2 key-value heads"):
        Heads(5, 2, 8)


def test_rows_are_those_that_the_model_reads() -> None:
    """What transformers does with the output of each layout, done to the numbers of its rows."""
    separate = Separate("q", "k", "v")
    for role, count in (("query", 6), ("key", 2), ("value", 2)):
        module, rows, total = separate.rows(role, HEADS)
        assert (module, total) == (role[0], count * 8)
        assert torch.equal(rows, torch.arange(total).view(count, 8))

    every = torch.arange((6 + 2 + 2) * 8)
    query, key, value = every.split([48, 16, 16])  # Phi-3, GPT-2
    for role, rows in (("query", query), ("key", key), ("value", value)):
        module, found, total = Stacked("qkv").rows(role, HEADS)
        assert (module, total) == ("qkv", 80)
        assert torch.equal(found.flatten(), rows)

    fused = every.view(2, 3 + 2, 8)  # Falcon-40B
    for role, rows in (("query", fused[:, :-2]), ("key", fused[:, [-2]]), ("value", fused[:, [-1]])):
        module, found, total = Grouped("qkv").rows(role, HEADS)
        assert (module, total) == ("qkv", 80)
        assert torch.equal(found, rows.reshape(-1, 8))


def test_norm_divides_itself_and_multiplies_its_readers_columns() -> None:
    shapes = {"norm.weight": (4,), "norm.bias": (4,), "fc.weight": (3, 4), "fc.bias": (3,), "experts": (2, 5, 4)}
    [site] = Norm("norm", ("fc", "experts", "absent")).expand(layer(shapes))
    assert (site.name, site.kind, site.n_channels) == ("layers.0.norm.norm", "norm", 4)
    assert [(part.tensor, tuple(part.channels.shape), part.divided) for part in site.parts] == [
        ("layers.0.norm.weight", (4,), True),
        ("layers.0.norm.bias", (4,), True),
        ("layers.0.fc.weight", (1, 4), False),
        ("layers.0.experts", (1, 1, 4), False),
    ]


def test_values_of_a_group_are_read_by_the_columns_of_all_its_heads() -> None:
    shapes = {"q.weight": (48, 4), "k.weight": (16, 4), "v.weight": (16, 4), "v.bias": (16,), "o.weight": (4, 48)}
    [site] = ValueOutput(Separate("q", "k", "v"), "o").expand(layer(shapes))
    weight, bias, output = site.parts
    assert weight.channels.flatten().tolist() == bias.channels.tolist() == list(range(16))
    assert output.channels.flatten().tolist() == [*range(8)] * 3 + [*range(8, 16)] * 3


def test_queries_and_keys_in_one_tensor_take_part_twice_on_different_rows() -> None:
    [site] = QueryKey(Grouped("qkv")).expand(layer({"qkv.weight": (80, 4)}))
    key, query = (part.channels.flatten() for part in site.parts)
    assert [part.divided for part in site.parts] == [True, False]
    assert not ((key >= 0) & (query >= 0)).any()
    assert ((key < 0) & (query < 0)).sum() == 2 * 8  # the values
    assert query[:8].tolist() == query[16:24].tolist() == key[24:32].tolist() == [0, 1, 2, 3] * 2
    assert query[40:48].tolist() == key[64:72].tolist() == [4, 5, 6, 7] * 2


@pytest.mark.parametrize("norm", [(8,), (48,), (6, 8)])
def test_norms_of_queries_and_keys_take_the_factors(norm: tuple[int, ...]) -> None:
    shapes = {"q.weight": (48, 4), "k.weight": (16, 4), "v.weight": (16, 4), "qn.weight": norm}
    shapes["kn.weight"] = {(8,): (8,), (48,): (16,), (6, 8): (2, 8)}[norm]
    [site] = QueryKey(Separate("q", "k", "v"), query_norm="qn", key_norm="kn").expand(layer(shapes))
    assert [part.tensor for part in site.parts] == ["layers.0.kn.weight", "layers.0.qn.weight"]
    assert [tuple(part.channels.shape) for part in site.parts] == [shapes["kn.weight"], norm]
    assert site.n_channels == (4 if norm == (8,) else 8)


def test_up_rows_of_experts() -> None:
    shapes = {f"e.{n}.{linear}.weight": shape for n in (0, 11) for linear, shape in (("up", (5, 4)), ("down", (4, 5)))}
    sites = list(UpDown("e.*.up", "e.*.down").expand(layer(shapes)))
    assert [site.name for site in sites] == ["layers.0.up.e.0.up", "layers.0.up.e.11.up"]
    assert [part.tensor for part in sites[1].parts] == ["layers.0.e.11.up.weight", "layers.0.e.11.down.weight"]

    [site] = UpDown("e.gate_up", "e.down", stacked=True).expand(layer({"e.gate_up": (2, 6, 4), "e.down": (2, 4, 3)}))
    assert site.n_channels == 6
    assert site.parts[0].channels.tolist() == [
        [[-1], [-1], [-1], [0], [1], [2]],
        [[-1], [-1], [-1], [3], [4], [5]],
    ]
    assert site.parts[1].channels.tolist() == [[[0, 1, 2]], [[3, 4, 5]]]


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ArchitectureError, match=r"layers\.0\.norm\.weight is missing from the checkpoint"):
        list(Norm("norm", ("fc",)).expand(layer({"fc.weight": (3, 4)})))
    with pytest.raises(ArchitectureError, match=r"layers\.0\.norm has no reader"):
        list(Norm("norm", ("fc",)).expand(layer({"norm.weight": (4,)})))
    with pytest.raises(ArchitectureError, match=r"layers\.0\.fc\.weight has shape \(3, 5\).* need \(1, 4\)"):
        list(Norm("norm", ("fc",)).expand(layer({"norm.weight": (4,), "fc.weight": (3, 5)})))
    with pytest.raises(ArchitectureError, match=r"layers\.0\.fc\.weight has shape \(12,\)"):  # packed by a quantizer
        list(Norm("norm", ("fc",)).expand(layer({"norm.weight": (4,), "fc.weight": (12,)})))
    with pytest.raises(ArchitectureError, match=r"layers\.0\.down\.weight is missing"):
        list(UpDown("up", "down").expand(layer({"up.weight": (3, 4)})))


def test_partial_rotation_only_where_the_family_knows_it() -> None:
    shapes = {"qkv.weight": (80, 4)}
    with pytest.raises(ArchitectureError, match=r"partial_rotary_factor is 0\.5, but models of type 'test' rotate"):
        list(QueryKey(Grouped("qkv")).expand(layer(shapes, rope_parameters={"partial_rotary_factor": 0.5})))
    partial = QueryKey(Grouped("qkv"), partial=True)
    with pytest.raises(ArchitectureError, match="3 of a head's 8 dimensions are rotated, which is odd"):
        list(partial.expand(layer(shapes, rope_parameters={"partial_rotary_factor": 3 / 8})))
