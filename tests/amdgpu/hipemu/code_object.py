"""What a HIP fat binary holds: clang's offload bundle, and the AMD code object (an ELF) for one GPU in it."""

from __future__ import annotations

import ctypes
import struct


def find_in_bundle(address: int, arch: str) -> bytes:
    """The code object for `arch` in the uncompressed offload bundle at `address`."""
    magic = ctypes.string_at(address, 24)
    if magic != b"__CLANG_OFFLOAD_BUNDLE__":
        raise ValueError(f"not an uncompressed offload bundle: {magic!r}")
    (count,) = struct.unpack("<Q", ctypes.string_at(address + 24, 8))
    at, names = address + 32, []
    for _ in range(count):
        offset, size, length = struct.unpack("<QQQ", ctypes.string_at(at, 24))
        name = ctypes.string_at(at + 24, length).decode()
        at += 24 + length
        names.append(name)
        if name.split("--")[-1].split(":")[0] == arch:
            return ctypes.string_at(address + offset, size)
    raise LookupError(f"no code object for {arch}; the bundle holds {names}")


def read_message_pack(data: bytes):
    """The subset of MessagePack that AMDGPU metadata uses."""
    at = 0

    def take(fmt: str):
        nonlocal at
        (value,) = struct.unpack_from(">" + fmt, data, at)
        at += struct.calcsize(fmt)
        return value

    def text(length: int) -> str:
        nonlocal at
        at += length
        return data[at - length : at].decode()

    def value():
        tag = take("B")
        if tag <= 0x7F:
            return tag
        if tag >= 0xE0:
            return tag - 256
        if tag <= 0x8F or tag in (0xDE, 0xDF):
            pairs = tag & 15 if tag <= 0x8F else take("HI"[tag - 0xDE])
            return {value(): value() for _ in range(pairs)}
        if tag <= 0x9F or tag in (0xDC, 0xDD):
            return [value() for _ in range(tag & 15 if tag <= 0x9F else take("HI"[tag - 0xDC]))]
        if tag <= 0xBF:
            return text(tag & 31)
        if 0xD9 <= tag <= 0xDB:
            return text(take("BHI"[tag - 0xD9]))
        if 0xCC <= tag <= 0xD3:
            return take("BHIQbhiq"[tag - 0xCC])
        if tag in (0xC2, 0xC3):
            return tag == 0xC3
        raise ValueError(f"MessagePack tag {tag:#x} at {at - 1}")

    return value()


def read_metadata(note_section: bytes) -> dict:
    """The kernels' metadata by name, out of the ELF's .note section, which has a note of each source that was
    linked.
    """
    kernels, at = {}, 0
    while at < len(note_section):
        name_size, size, _ = struct.unpack_from("<III", note_section, at)
        start = at + 12 + (name_size + 3) // 4 * 4
        metadata = read_message_pack(note_section[start : start + size])
        kernels |= {kernel[".name"]: kernel for kernel in metadata["amdhsa.kernels"]}
        at = start + (size + 3) // 4 * 4
    return kernels
