"""Hostile pickles: each creates a canary file if anything in it is executed."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


class _Calls:
    """Pickles as a call of ``function(*args)``."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._call = (function, args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


class _Builds:
    """Pickles as a harmless object whose BUILD state is a call."""

    def __init__(self, state: Any) -> None:
        self._state = state

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Builds, (None,), {"x": self._state})


def payloads(canary: Path) -> Iterator[tuple[str, bytes]]:
    """(name, pickle bytes); executing any of them creates ``canary``."""
    touch = f"touch {canary}"
    python = f"open({str(canary)!r}, 'w').close()"
    calls = {
        "os.system": _Calls(os.system, touch),
        "os.popen": _Calls(os.popen, touch),
        "subprocess.call": _Calls(subprocess.call, ["touch", str(canary)]),
        "eval": _Calls(eval, python),
        "exec": _Calls(exec, python),
        "builtins.open": _Calls(open, str(canary), "w"),
        "os.mkdir": _Calls(os.mkdir, str(canary)),
        "getattr": _Calls(getattr, "text", "upper"),
        "build": _Builds(_Calls(os.system, touch)),
    }
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        for name, call in calls.items():
            yield f"{name}-{protocol}", pickle.dumps(call, protocol)
            yield f"{name}-in-dict-{protocol}", pickle.dumps({"w": [call]}, protocol)
    yield from _opcodes(touch, python)
    # A forbidden function of an allowed module: torch.save({}, canary).
    path = str(canary).encode()
    yield "torch.save", b"\x80\x04\x8c\x05torch\x8c\x04save\x93}\x8c" + bytes([len(path)]) + path + b"\x86R."


def _opcodes(touch: str, python: str) -> Iterator[tuple[str, bytes]]:
    """Handwritten pickles that no Python object produces: GLOBAL, INST, OBJ, STACK_GLOBAL, persistent ids."""
    system = touch.encode()
    yield "GLOBAL+REDUCE", b"cos\nsystem\n(S'" + system + b"'\ntR."
    yield "INST", b"(S'" + system + b"'\nios\nsystem\n."
    yield "OBJ", b"(cos\nsystem\nS'" + system + b"'\no."
    yield "posix", b"cposix\nsystem\n(S'" + system + b"'\ntR."
    yield "builtins.exec", b"cbuiltins\nexec\n(S" + repr(python).encode() + b"\ntR."
    yield "__builtin__.eval", b"c__builtin__\neval\n(S" + repr(python).encode() + b"\ntR."
    # A dotted name walks attributes of an allowed module: torch.os.system.
    yield (
        "dotted",
        b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93\x8c" + bytes([len(system)]) + system + b"\x85R.",
    )
    yield "torch.load", b"\x80\x04\x8c\x05torch\x8c\x04load\x93\x8c\x01x\x85R."
    yield "EXT1", b"\x80\x02\x82\x01."
    yield "PERSID", b"Pos.system\n."
    yield "NEXT_BUFFER", b"\x80\x05\x97."


def replace_string(data: bytes, old: str, new: str) -> bytes:
    """A pickle with one short string replaced by another."""
    for _, argument, position in pickletools.genops(data):
        if argument == old:
            head = data[position : position + 1]
            assert head == b"\x8c", "only SHORT_BINUNICODE strings are replaced"
            end = position + 2 + len(old.encode())
            return _without_frames(
                data[:position] + b"\x8c" + bytes([len(new.encode())]) + new.encode() + data[end:]
            )
    raise ValueError(f"{old!r} is not in the pickle")


def _without_frames(data: bytes) -> bytes:
    """Removes frames, which are optional: an edit would invalidate their lengths."""
    out = io.BytesIO()
    index = 0
    while (found := data.find(b"\x95", index)) != -1 and index == 0:
        out.write(data[:found])
        index = found + 9
    out.write(data[index:])
    return out.getvalue()
