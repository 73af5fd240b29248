"""Pickles of plain data from strangers: numbers, texts, bytes, lists, tuples, dicts. Nothing that could run code.

A pickle is a program for a small stack machine. The opcodes that fetch a class or function, call it, or fill an object
are not on the list here, so a body with one of them is refused before the machine starts. What is left builds plain
data. Behind that stands a second wall: an unpickler that cannot look up any name.
"""

import io
import pickle
import pickletools
from typing import Any

# What Python 3 writes for None, bool, int, float, str, bytes, list, tuple, dict, in protocols 3 to 5, and the framing.
# fmt: off
PLAIN_OPCODES = frozenset([
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "MEMOIZE", "BINPUT", "BINGET", "LONG_BINGET",
    "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
    "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8",
    "EMPTY_LIST", "APPEND", "APPENDS", "LIST", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS",
])
# fmt: on
MAX_OPCODES = 50_000  # more than any request of the dialects has, and few enough for crafted dictionary keys
# LONG_BINPUT makes the machine's memory as large as the number that it names, so the number is checked.
_MEMO_PUT = "LONG_BINPUT"


def loads_plain(body: bytes) -> Any:
    """The plain data in a pickle.

    Args:
        body: protocol 3 or newer (in 2, bytes are written as a call).

    Raises:
        ValueError: anything but plain data (the first opcode at fault is named), too much of it, or no pickle.

    Example:
        >>> loads_plain(pickle.dumps({"images": [b"pixels"], "only_strict": True}))
        {'images': [b'pixels'], 'only_strict': True}
        >>> loads_plain(pickle.dumps(print))
        Traceback (most recent call last):
        ValueError: expected plain data, got the opcode STACK_GLOBAL, which could run code.
    """
    count = 0
    try:
        for opcode, argument, _ in pickletools.genops(body):
            count += 1
            if count > MAX_OPCODES:
                raise ValueError(f"expected at most {MAX_OPCODES} opcodes.")
            if opcode.name == _MEMO_PUT and isinstance(argument, int) and argument <= MAX_OPCODES:
                continue
            if opcode.name not in PLAIN_OPCODES:
                raise ValueError(f"expected plain data, got the opcode {opcode.name}, which could run code.")
        return _NoNames(io.BytesIO(body)).load()
    except ValueError:
        raise
    except Exception as error:  # the machine's own errors: empty stack, unhashable key, missing memo, bad UTF-8
        raise ValueError(f"expected a pickle of plain data ({type(error).__name__}: {error}).") from None


class _NoNames(pickle.Unpickler):
    """An unpickler for which no class or function exists."""

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"expected plain data, got a reference to {module}.{name}.")

    def persistent_load(self, pid: Any) -> Any:
        raise ValueError("expected plain data, got a persistent reference.")
