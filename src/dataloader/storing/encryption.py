"""Batches that nobody reads who has only the files: AES-256-GCM, from the `cryptography` library.

The key is made by the producer, kept in memory and told to readers over their connection; it is in no file. A sealed
file is `magic, nonce, ciphertext and tag`. What belongs to the batch's place is authenticated with it, so that one
sealed batch cannot be put in another's place.
"""

from __future__ import annotations

import os
from typing import Any

from ..errors import CacheCorruptError, DataLoaderError

KEY_BYTES = 32
_MAGIC = b"HPBATCH1"
_NONCE_BYTES = 12


class Sealer:
    """Seals and opens with one key."""

    def __init__(self, key: bytes) -> None:
        try:
            from cryptography.exceptions import InvalidTag
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError as error:
            raise DataLoaderError(
                "enable_batch_encryption needs the cryptography library: pip install 'hyperpodrun[encryption]'"
            ) from error
        self._cipher = AESGCM(key)
        self._invalid = InvalidTag

    def seal(self, buffers: list[Any], place: bytes) -> list[Any]:
        nonce = os.urandom(_NONCE_BYTES)  # 96 random bits: one key may seal 2^32 batches
        plain = b"".join(memoryview(buffer).cast("B") for buffer in buffers)
        return [_MAGIC, nonce, self._cipher.encrypt(nonce, plain, place)]

    def open(self, memory: Any, place: bytes) -> bytearray:
        """The plain bytes. Raises CacheCorruptError when they were not sealed with this key for this place."""
        view = memoryview(memory)
        begin = len(_MAGIC) + _NONCE_BYTES
        if view[: len(_MAGIC)] != _MAGIC:
            raise CacheCorruptError("it is not an encrypted batch")
        try:
            return bytearray(self._cipher.decrypt(view[len(_MAGIC) : begin], view[begin:], place))
        except self._invalid:
            raise CacheCorruptError("it was changed, or encrypted with another key or for another place") from None


def sealer(key: bytes) -> Sealer | None:
    """None without a key: an empty one says that batches are not encrypted."""
    return Sealer(key) if key else None
