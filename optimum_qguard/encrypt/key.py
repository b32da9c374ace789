"""The key: 256 bits, and the streams of bytes that are derived from it, by name, the same for ever."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from optimum_qguard.encrypt.errors import EncryptError

KEY_BYTES = 32
_VERSION = 1
_STREAM = b"optimum-qguard encrypt 1\0"
_FINGERPRINT = b"optimum-qguard key fingerprint 1\0"


@dataclass(frozen=True)
class Key:
    """A secret of 32 bytes. Its text does not show it."""

    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.secret) != KEY_BYTES:
            raise EncryptError(f"a key has {KEY_BYTES} bytes, not {len(self.secret)}")

    @classmethod
    def generate(cls) -> Key:
        """A new key from the operating system's randomness."""
        return cls(secrets.token_bytes(KEY_BYTES))

    @property
    def fingerprint(self) -> str:
        """64 hexadecimal digits that name the key and tell nothing about it."""
        return hashlib.sha256(_FINGERPRINT + self.secret).hexdigest()

    def stream(self, name: str, length: int) -> bytes:
        """``length`` bytes that look random to whoever lacks the key: SHAKE-256 over key and ``name``."""
        return hashlib.shake_256(_STREAM + self.secret + name.encode()).digest(length)

    def save(self, path: str | Path) -> None:
        """Write the key to a new file that only its owner may read (mode 0600).

        Raises:
            EncryptError: the file exists already (a key is never overwritten), or cannot be written.
        """
        path = Path(path).expanduser()
        content = {"version": _VERSION, "key": self.secret.hex(), "fingerprint": self.fingerprint}
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    file.write(json.dumps(content, indent=2) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                os.link(partial, path)  # unlike a renaming, this never replaces another key
            finally:
                partial.unlink(missing_ok=True)
        except FileExistsError:
            raise EncryptError(f"{path}: exists already, and a key is never overwritten; name another file") from None
        except OSError as error:
            raise EncryptError(f"{path}: cannot be written: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: str | Path) -> Key:
        """Read a key file.

        Raises:
            EncryptError: there is no such file, it is not a key file, or it was damaged.
        """
        path = Path(path).expanduser()
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version, secret, fingerprint = content["version"], bytes.fromhex(content["key"]), content["fingerprint"]
        except OSError as error:
            raise EncryptError(f"{path}: cannot be read: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise EncryptError(f"{path}: not a key file of qguard; qguard encrypt --new-key makes one") from error
        if version != _VERSION:
            raise EncryptError(f"{path}: a key file of version {version}; update optimum-qguard to read it")
        if len(secret) != KEY_BYTES or cls(secret).fingerprint != fingerprint:
            raise EncryptError(f"{path}: damaged: key and fingerprint do not belong together; use a copy of it")
        return cls(secret)
