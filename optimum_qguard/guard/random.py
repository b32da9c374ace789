"""Random bits that an attacker cannot foresee, addressable by tensor and position.

The bits of a tensor are the keystream of AES-256 in counter mode, keyed by SHA-256 over the seed and the tensor's name.
So they depend on nothing but (seed, name, position): not on the order in which tensors are loaded, not on threads, not
on the device, not on a library's generator. The default seed is 256 bits from the operating system.
"""

from __future__ import annotations

import hashlib
import secrets
from functools import cache

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from optimum_qguard.formats import Scratch

SEED_BYTES = 32
_DOMAIN = b"optimum-qguard noise 1\0"
_AES_BLOCK = 16
SPACING = 2.0**-16
CENTRE = 0.5 + SPACING / 2  # of the interval of word 0
_CENTRE = torch.tensor(CENTRE, device="cpu")
_ZEROS = memoryview(bytes(1 << 21))


def fresh_seed() -> int:
    """256 bits from the operating system."""
    return secrets.randbits(8 * SEED_BYTES)


class RandomStream:
    """The random bits of one tensor.

    Args:
        seed: an integer below 2**256.
        name: the tensor's full parameter name.
        scratch: buffers that may be used.
    """

    def __init__(self, seed: int, name: str, scratch: Scratch | None = None) -> None:
        self._seed, self._name = seed, name
        key = hashlib.sha256(_DOMAIN + seed.to_bytes(SEED_BYTES, "big") + name.encode()).digest()
        self._scratch = scratch or Scratch()
        self._keystream = Cipher(algorithms.AES(key), modes.CTR(bytes(_AES_BLOCK))).encryptor()

    def fork(self) -> RandomStream:
        """The same bits with buffers of its own, for another thread."""
        return RandomStream(self._seed, self._name)

    def words(self, start: int, count: int) -> Tensor:
        """Random int16 on the CPU, for elements from ``start`` on; valid until the next call, which reuses them."""
        block, skip = divmod(start * torch.int16.itemsize, _AES_BLOCK)
        size = skip + count * torch.int16.itemsize
        buffer = self._scratch.bytes(size + _AES_BLOCK - 1)
        self._keystream.reset_nonce(block.to_bytes(_AES_BLOCK, "big"))
        zeros = _ZEROS[:size] if size <= len(_ZEROS) else bytes(size)
        self._keystream.update_into(zeros, buffer)
        return torch.frombuffer(buffer, dtype=torch.int16, count=count, offset=skip)

    def uniform(self, start: int, out: Tensor) -> Tensor:
        """Fill ``out`` (contiguous float32) with uniform numbers on (0, 1), for elements from ``start`` on; return it.

        They are the centres of 2**16 equal intervals, so a probability is realised to within 2**-17.
        """
        words = self.words(start, out.numel()).to(out.device)
        flat = out.view(-1).copy_(words)
        torch.add(_CENTRE.to(out.device), flat, alpha=2**-16, out=flat)
        return out

    def normal(self, start: int, out: Tensor) -> Tensor:
        """Fill ``out`` (contiguous float32) with standard normal numbers, for elements from ``start`` on; return it.

        They are the quantiles in the centres of 2**16 equal intervals, scaled to variance 1: none is beyond 4.4.
        """
        words = self.words(start, out.numel()).to(out.device)
        index = self._scratch.like(out, "index", torch.int32).view(-1).copy_(words.view(torch.uint16))
        torch.index_select(normal_quantiles().to(out.device), 0, index, out=out.view(-1))
        return out


@cache
def normal_quantiles() -> Tensor:
    """``(65536,)`` float32 on the CPU: the standard normal number of each word, at the word's bits as uint16."""
    centres = (torch.arange(2**16, dtype=torch.float64, device="cpu") + 0.5) / 2**16
    quantiles: Tensor = torch.special.ndtri(centres)
    # The signed word w stands for interval w + 2**15, and is looked up by its bits.
    return (quantiles / quantiles.std(correction=0)).float().roll(2**15)
