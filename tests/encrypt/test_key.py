"""Keys and what is derived from them: the same for ever."""

import hashlib
import json
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from optimum_qguard.encrypt.errors import EncryptError
from optimum_qguard.encrypt.key import Key
from optimum_qguard.encrypt.sites import Site
from optimum_qguard.encrypt.traps import Traps

KNOWN = Key(bytes(range(32)))


def test_streams_are_shake256_over_key_and_name() -> None:
    expected = hashlib.shake_256(b"optimum-qguard encrypt 1\0" + bytes(range(32)) + b"a site").digest(20)
    assert KNOWN.stream("a site", 20) == expected
    assert KNOWN.stream("a site", 40)[:20] == expected


def test_known_answers() -> None:
    """If this fails, checkpoints that were encrypted before can no longer be decrypted."""
    assert KNOWN.fingerprint == "e4cf8cd8dd1dbe7bc35d7faa76b547a0a986a92e076810e983a0c969a2b95f5c"
    site = Site("model.layers.0.norm.input_layernorm", "norm", 16, ())
    exponents = Traps(strength=3, fraction=0.5).exponents(KNOWN, site)
    assert exponents.tolist() == [
        -3,
        0,
        0,
        3,
        0,
        0,
        0,
        0,
        3,
        -3,
        0,
        -3,
        0,
        -3,
        -3,
        -3,
    ]
    exponents = Traps(strength=9, fraction=0.25, positive_only=True).exponents(KNOWN, site)
    assert exponents.tolist() == [
        0,
        0,
        0,
        9,
        0,
        0,
        0,
        0,
        0,
        9,
        0,
        0,
        0,
        0,
        9,
        9,
    ]


def test_queries_and_keys_have_a_fraction_of_their_own() -> None:
    site = Site("model.layers.0.key", "key", 64, ())
    traps = Traps(strength=3, fraction=0.25, qk_fraction=0.75)
    drawn = traps.exponents(KNOWN, site)
    assert int((drawn != 0).sum()) == 48
    assert torch.equal(drawn, Traps(strength=3, fraction=0.75).exponents(KNOWN, replace(site, kind="up")))
    assert int((traps.exponents(KNOWN, replace(site, kind="value")) != 0).sum()) == 16


def test_positive_traps_make_no_activations_larger() -> None:
    traps = Traps(positive_only=True)
    assert not traps.exponents(KNOWN, Site("s", "key", 64, ())).any()
    assert set(traps.exponents(KNOWN, Site("s", "value", 64, ())).unique().tolist()) == {0, 18}


def test_each_key_and_site_has_its_own_exponents() -> None:
    sites = [Site(name, "norm", 512, ()) for name in ("a", "b")]
    drawn = [Traps().exponents(key, site) for key in (KNOWN, Key.generate()) for site in sites]
    for index, exponents in enumerate(drawn):
        assert int((exponents != 0).sum()) == 128
        assert set(exponents.unique().tolist()) == {-18, 0, 18}
        assert 40 < int((exponents > 0).sum()) < 88
        assert not any(torch.equal(exponents, other) for other in drawn[:index])


@pytest.mark.parametrize("channels", [1, 3, 8])
def test_a_trap_in_every_site(channels: int) -> None:
    exponents = Traps(fraction=0.01).exponents(KNOWN, Site("s", "up", channels, ()))
    assert int((exponents != 0).sum()) == 1


def test_save_and_load(tmp_path: Path) -> None:
    key, path = Key.generate(), tmp_path / "model.key"
    key.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Key.load(path) == key
    assert [file.name for file in tmp_path.iterdir()] == ["model.key"]
    before = path.read_bytes()
    with pytest.raises(EncryptError, match="never overwritten"):
        Key.generate().save(path)
    assert path.read_bytes() == before
    assert key.secret.hex() not in repr(key)


def test_bad_key_files(tmp_path: Path) -> None:
    path = tmp_path / "key"
    Key.generate().save(path)
    content = json.loads(path.read_text())
    other = Key.generate().secret.hex()
    for broken, message in [
        ("no json", "not a key file"),
        ("[]", "not a key file"),
        (json.dumps(content | {"key": other}), "damaged"),
        (json.dumps(content | {"key": "00"}), "damaged"),
        (json.dumps(content | {"version": 2}), "update optimum-qguard"),
    ]:
        path.write_text(broken)
        with pytest.raises(EncryptError, match=message):
            Key.load(path)
    with pytest.raises(EncryptError, match="cannot be read"):
        Key.load(tmp_path / "missing")
    with pytest.raises(EncryptError, match="32 bytes"):
        Key(b"short")
    with pytest.raises(EncryptError, match="cannot be written"):
        KNOWN.save(tmp_path / "no" / "folder")


@pytest.mark.parametrize(
    "options",
    [
        {"strength": 0},
        {"strength": 65},
        {"fraction": 0.0},
        {"fraction": 1.5},
        {"fraction": float("nan")},
        {"qk_fraction": 0.0},
    ],
)
def test_bad_traps(options: dict[str, float]) -> None:
    with pytest.raises(EncryptError, match=next(iter(options))):
        Traps(**options)  # type: ignore[arg-type]
