"""Finds where gloo ranks listen, in the values they publish through a store.

Owns the knowledge of one binary layout. Pure. The store asks at abort time: the sockets to shut down are
the connected ones with one of these listeners at either end, and never a listener itself.

What a rank of torch 2.13 publishes (little-endian, native alignment, LP64 Linux), whatever GLOO_ENABLE_*
says:
    u64 h | h bytes of host name | u64 136 | 128 bytes sockaddr_storage | i64 -1 | n times i64
The -1 says that the address is a device's listener. The n numbers tell pairs apart: one for each rank, and
none with GLOO_ENABLE_RANK_AS_SEQUENCE_NUMBER=1. Of the sockaddr only the family's own fields count; the
rest of the 128 bytes is whatever the kernel and the stack left there.
"""

from __future__ import annotations

import socket
import struct

_U64 = struct.Struct("<Q")
_I64 = struct.Struct("<q")
_STORAGE = 128
_ADDRESS = _STORAGE + _I64.size
_HOST_NAME_MAX = 255
_AF_INET = b"\x02\x00"
_AF_INET6 = b"\x0a\x00"


def listeners_in(value: bytes | bytearray) -> tuple[tuple[str, int], ...]:
    """The (ip, port) that a value publishes as a gloo listener; empty for any other value."""
    if len(value) < 2 * _U64.size + _ADDRESS:
        return ()
    name_length = _U64.unpack_from(value)[0]
    if not 0 < name_length <= _HOST_NAME_MAX:
        return ()
    at = _U64.size + name_length
    start, end = at + _U64.size, at + _U64.size + _ADDRESS
    if end > len(value) or (len(value) - end) % _I64.size:
        return ()
    if _U64.unpack_from(value, at)[0] != _ADDRESS or _I64.unpack_from(value, end - _I64.size)[0] != -1:
        return ()
    if b"\x00" in value[_U64.size : at]:
        return ()
    return _endpoint(bytes(value[start : start + _STORAGE]))


def _endpoint(storage: bytes) -> tuple[tuple[str, int], ...]:
    port = int.from_bytes(storage[2:4], "big")
    if not port:
        return ()
    if storage.startswith(_AF_INET) and not any(storage[8:16]):
        return ((socket.inet_ntop(socket.AF_INET, storage[4:8]), port),)
    if storage.startswith(_AF_INET6):
        return ((socket.inet_ntop(socket.AF_INET6, storage[8:24]), port),)
    return ()
