"""Mechanism A: matrices of a wanted condition number, drawn by the key, and their inverses."""

from itertools import pairwise

import pytest
import torch

from optimum_qguard.encrypt.conditioning import Conditioning, spectrum
from optimum_qguard.encrypt.drawing import hadamard, orthogonal, uniforms
from optimum_qguard.encrypt.errors import EncryptError
from optimum_qguard.encrypt.key import Key
from optimum_qguard.encrypt.sites import Site, in_band

KNOWN = Key(bytes(range(32)))


def layers(count: int, size: int = 4, groups: int = 2) -> list[Site]:
    names = [f"model.layers.{layer}.value.self_attn.v_proj" for layer in range(count)]
    sites = [Site(name, "value", groups * size, (), size) for name in names]
    return [Site("model.layers.0.norm.input_layernorm", "norm", 16, ()), *sites]


def conditioned(conditioning: Conditioning, count: int) -> list[int]:
    kappas = conditioning.kappas(KNOWN, layers(count))
    return [layer for layer, site in enumerate(layers(count)[1:]) if site.name in kappas]


def test_known_answers() -> None:
    """If this fails, checkpoints that were encrypted before can no longer be decrypted."""
    assert uniforms(KNOWN, "a name", 2).tolist() == [0.9636150899021405, 0.37523668888483486]
    assert (2 * orthogonal(KNOWN, "a name", 4)).tolist() == [
        [-1, -1, -1, -1],
        [-1, 1, 1, -1],
        [-1, 1, -1, 1],
        [-1, -1, 1, 1],
    ]
    expected = [
        [0.6008234247385946, -0.4883475034782487, 0.6328727582476180],
        [-0.7748118711799935, -0.1609878751847444, 0.6113505281931620],
        [-0.1966666635806469, -0.8576710441014450, -0.4751027294659480],
    ]
    torch.testing.assert_close(orthogonal(KNOWN, "a name", 3).tolist(), expected, rtol=1e-13, atol=0)
    sites = layers(32)
    assert sorted(set(range(32)) - set(conditioned(Conditioning(), 32))) == [2, 6, 10, 21]
    kappas = Conditioning().kappas(KNOWN, sites)
    assert kappas[sites[1].name] == pytest.approx(30.978543, abs=1e-6)
    matrix, _ = Conditioning().blocks(KNOWN, sites)[sites[1].name](1)
    row = [2.0204919808796213, 1.0445634719734254, 1.6485213688598122, -0.8522603509314215]
    torch.testing.assert_close(matrix[0].tolist(), row, rtol=1e-13, atol=0)


@pytest.mark.parametrize("size", [1, 2, 3, 24, 64, 80, 128])
def test_q_is_orthogonal(size: int) -> None:
    q = orthogonal(KNOWN, "some name", size)
    assert q.dtype == torch.float64
    torch.testing.assert_close(q @ q.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-14 * max(size, 8))
    assert size == 1 or not torch.equal(q.abs(), orthogonal(KNOWN, "another", size)) or size & (size - 1) == 0
    assert size < 24 or not torch.equal(q, orthogonal(KNOWN, "another", size))
    assert size < 24 or not torch.equal(q, orthogonal(Key(bytes(32)), "some name", size))


def test_hadamard() -> None:
    for size in (1, 2, 16):
        assert (hadamard(size) @ hadamard(size).T == size * torch.eye(size).numpy()).all()


@pytest.mark.parametrize("size", [2, 24, 64])
@pytest.mark.parametrize("kappa", [2.0, 32.0, 1024.0])
def test_the_condition_number_is_kappa(kappa: float, size: int) -> None:
    conditioning = Conditioning(kappa_min=kappa, kappa_max=kappa, plain_layers=0)
    sites = layers(1, size)
    for block in (0, 1):
        s, inverse = conditioning.blocks(KNOWN, sites)[sites[1].name](block)
        identity = torch.eye(size, dtype=torch.float64)
        torch.testing.assert_close(s @ inverse, identity, rtol=0, atol=1e-13 * kappa)
        assert float(torch.linalg.cond(s)) == pytest.approx(kappa, rel=1e-9)
        torch.testing.assert_close(s, s.T, rtol=0, atol=1e-13)
        eigenvalues = torch.linalg.eigvalsh(s).log2()
        torch.testing.assert_close(eigenvalues.diff(), torch.full_like(eigenvalues[1:], eigenvalues.diff()[0]))
        assert float(eigenvalues.sum()) == pytest.approx(0, abs=1e-9)
        assert size == 2 or (s - torch.diag(s.diagonal())).abs().amax() > 0.03, "not diagonal"


def test_spectrum_of_one_dimension() -> None:
    assert spectrum(32.0, 1).shape == (1,)


def test_layers_left_alone_are_apart() -> None:
    for count, plain in ((32, 4), (28, 4), (7, 3), (2, 1), (1, 0)):
        chosen = conditioned(Conditioning(), count)
        left = sorted(set(range(count)) - set(chosen))
        assert len(left) <= plain
        assert all(after - before >= 3 for before, after in pairwise(left))
        assert chosen
    assert len(conditioned(Conditioning(), 32)) == 28
    assert conditioned(Conditioning(plain_layers=0), 6) == [0, 1, 2, 3, 4, 5]
    assert conditioned(Conditioning(plain_layers=0, first_layer=2, last_layer=3), 6) == [2, 3]
    assert conditioned(Conditioning(kappa_min=1, kappa_max=1), 6) == []
    kappas = Conditioning().kappas(KNOWN, layers(32)).values()
    assert all(28 <= kappa <= 32 for kappa in kappas)
    assert len(set(kappas)) == len(kappas)


def test_bad_parameters() -> None:
    for options, message in [
        ({"kappa_min": 0.5}, "kappa is from 1"),
        ({"kappa_min": 9.0, "kappa_max": 8.0}, "the least first"),
        ({"kappa_max": float("nan")}, "kappa"),
        ({"plain_layers": -1}, "plain_layers"),
        ({"spacing": 0}, "spacing"),
    ]:
        with pytest.raises(EncryptError, match=message):
            Conditioning(**options)
    for first, last in ((-1, None), (2, None), (0, 2), (1, 0)):
        with pytest.raises(EncryptError, match="the model has layers 0 to 1"):
            in_band(layers(2), first, last)
