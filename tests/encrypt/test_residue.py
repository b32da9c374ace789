"""Mechanism B: shears whose inverse is exact, in the layers and as large as they should be."""

import pytest
import torch
from test_conditioning import KNOWN, layers

from optimum_qguard.encrypt.errors import EncryptError
from optimum_qguard.encrypt.residue import Residue


def test_known_answers() -> None:
    """If this fails, checkpoints that were encrypted before can no longer be decrypted."""
    sites = layers(32)
    epsilons = Residue().epsilons(KNOWN, sites)
    assert list(epsilons.values())[:2] == pytest.approx([0.009202084498241588, 0.009212331325426745], rel=1e-12)
    matrix, _ = Residue().blocks(KNOWN, sites)[sites[1].name](1)
    expected = [1.0046010422491208, 0.0, 0.004601042249120794, 0.0]
    torch.testing.assert_close(matrix[0].tolist(), expected, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize(("size", "rank"), [(4, 2), (64, 1), (64, 8), (24, 2), (80, 40)])
def test_a_shear_and_its_inverse(size: int, rank: int) -> None:
    epsilon = 3.0
    sites = layers(1, size)
    blocks = Residue(epsilon_min=epsilon, epsilon_max=epsilon, rank=rank).blocks(KNOWN, sites)[sites[1].name]
    identity = torch.eye(size, dtype=torch.float64)
    for block in (0, 1):
        shear, inverse = blocks(block)
        torch.testing.assert_close(shear @ inverse, identity, rtol=0, atol=1e-12)
        torch.testing.assert_close(shear + inverse, 2 * identity)  # the same pair with the other sign
        singular = torch.linalg.svdvals(shear - identity)
        expected = torch.tensor([epsilon] * rank + [0.0] * (size - rank), dtype=torch.float64)
        torch.testing.assert_close(singular, expected, rtol=1e-12, atol=1e-12)
    assert not torch.equal(blocks(0)[0], blocks(1)[0])


def test_which_layers() -> None:
    sites = layers(32)
    epsilons = Residue().epsilons(KNOWN, sites)
    assert list(epsilons) == [site.name for site in sites[1::3]]
    assert all(6e-3 <= epsilon <= 1e-2 for epsilon in epsilons.values())
    assert len(set(epsilons.values())) == len(epsilons)
    banded = Residue(every=2, first_layer=3, last_layer=7).epsilons(KNOWN, sites)
    assert list(banded) == [sites[1 + layer].name for layer in (3, 5, 7)]
    assert Residue(rank=0).blocks(KNOWN, sites) == {}


def test_bad_parameters() -> None:
    for options, message in [
        ({"epsilon_min": -1.0}, "epsilon is from 0"),
        ({"epsilon_min": 0.5}, "the least first"),
        ({"epsilon_max": float("nan")}, "epsilon"),
        ({"rank": -1}, "rank"),
        ({"every": 0}, "every"),
    ]:
        with pytest.raises(EncryptError, match=message):
            Residue(**options)  # type: ignore[arg-type]
    with pytest.raises(EncryptError, match="rank is at most 2, half the 4 dimensions of a head, not 3"):
        Residue(rank=3).blocks(KNOWN, layers(1))
    with pytest.raises(EncryptError, match="the model has layers 0 to 1"):
        Residue(last_layer=5).blocks(KNOWN, layers(2))
