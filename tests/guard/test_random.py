"""The random bits: what they are, how they are distributed, and that nothing but (seed, name, position) matters."""

import hashlib
import math

import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from optimum_qguard.guard.random import RandomStream, fresh_seed

N = 1 << 20
# Kolmogorov's distribution: 1.95 / sqrt(n) is exceeded once in a thousand seeds, and these seeds are fixed.
KS_BOUND = 1.95 / math.sqrt(N)


def kolmogorov_smirnov(probabilities: Tensor) -> float:
    """Largest distance of the empirical distribution from the uniform one."""
    ordered = probabilities.double().sort().values
    rank = torch.arange(len(ordered) + 1, dtype=torch.float64) / len(ordered)
    return float(torch.maximum((ordered - rank[:-1]).abs().max(), (rank[1:] - ordered).abs().max()))


def test_uniform_numbers_are_the_aes_counter_keystream() -> None:
    seed, name = 2**200 + 17, "model.layers.3.mlp.down_proj.weight"
    key = hashlib.sha256(b"optimum-qguard noise 1\0" + seed.to_bytes(32, "big") + name.encode()).digest()
    keystream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(64))
    words = torch.frombuffer(bytearray(keystream), dtype=torch.int16).double()
    assert torch.equal(RandomStream(seed, name).uniform(0, torch.empty(32)).double(), (words + 32768.5) / 65536)


def test_the_first_numbers_never_change() -> None:
    """A recorded seed must draw the same noise in every later version."""
    stream = RandomStream(7, "lm_head.weight")
    numbers = stream.uniform(0, torch.empty(6))
    assert [int(number * 65536) for number in numbers] == [4891, 17620, 24506, 43320, 25606, 54737]
    normal = torch.tensor([-1.4421055, -0.6162480, -0.3214405, 0.4152482])
    torch.testing.assert_close(stream.normal(0, torch.empty(4)), normal, rtol=1e-5, atol=0)


def test_uniform_numbers_are_uniform_and_independent() -> None:
    numbers = RandomStream(1, "weight").uniform(0, torch.empty(N))
    assert 0 < numbers.min() < numbers.max() < 1
    assert kolmogorov_smirnov(numbers) < KS_BOUND
    centred = (numbers - 0.5) * math.sqrt(12)
    for lag in (1, 2, 7, 8, 64):
        assert abs(float((centred[lag:] * centred[:-lag]).mean())) < 4 / math.sqrt(N)


def test_normal_numbers_are_normal_and_independent() -> None:
    numbers = RandomStream(1, "weight").normal(0, torch.empty(N))
    assert kolmogorov_smirnov(torch.special.ndtr(numbers.double())) < KS_BOUND
    assert 4 < numbers.abs().max() < 4.4
    for lag in (1, 2, 3):
        assert abs(float((numbers[lag:] * numbers[:-lag]).mean())) < 4 / math.sqrt(N)
    pairs = numbers.view(-1, 2).square() - 1
    assert abs(float((pairs[:, 0] * pairs[:, 1]).mean())) < 4 * 2 / math.sqrt(N / 2), "the two of a pair depend"


@given(st.integers(0, 400), st.integers(1, 400), st.integers(0, 2**256 - 1), st.text())
def test_a_slice_is_the_slice_of_the_whole(start: int, count: int, seed: int, name: str) -> None:
    stream = RandomStream(seed, name)
    assert torch.equal(
        stream.uniform(start, torch.empty(count)), stream.uniform(0, torch.empty(1000))[start : start + count]
    )
    assert torch.equal(
        stream.normal(start, torch.empty(count)), stream.normal(0, torch.empty(1000))[start : start + count]
    )


def test_every_word_gives_its_quantile(monkeypatch: pytest.MonkeyPatch) -> None:
    words = torch.arange(-(2**15), 2**15).to(torch.int16)
    monkeypatch.setattr(RandomStream, "words", lambda *_: words)
    numbers = RandomStream(1, "weight").normal(0, torch.empty(2**16)).double()
    quantiles = torch.special.ndtri((torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16)
    torch.testing.assert_close(numbers, quantiles, rtol=1e-4, atol=0)
    assert float(numbers.mean()) == pytest.approx(0, abs=1e-8)
    assert float(numbers.square().mean()) == pytest.approx(1, abs=1e-6)


def test_far_positions_have_bits_of_their_own() -> None:
    stream = RandomStream(1, "weight")
    assert not torch.equal(stream.uniform(0, torch.empty(64)), stream.uniform(1 << 40, torch.empty(64)))


def test_other_names_and_seeds_are_independent() -> None:
    size = 1 << 18
    streams = [RandomStream(seed, name) for seed, name in [(1, "a"), (1, "b"), (2, "a"), (256, "a"), (1, "a.")]]
    rows = torch.stack([stream.normal(0, torch.empty(size)) for stream in streams])
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlation.abs().max() < 5 / math.sqrt(size)


def test_the_default_seed_is_fresh() -> None:
    seeds = {fresh_seed() for _ in range(64)}
    assert len(seeds) == 64
    assert max(seeds).bit_length() > 248
    assert all(0 <= seed < 2**256 for seed in seeds)
