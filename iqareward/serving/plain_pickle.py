"""Read pickles of plain data from strangers, without Python's unpickler.

A pickle is a program for a small stack machine. Python's machine can import and call anything, and it hashes whatever a
program uses as a dictionary key, which takes 2^n steps for n nested tuples. The machine here knows only the opcodes
that build plain data, and takes nothing but texts as keys. It is written in Python, so other threads get their turn.
"""

import pickle
import pickletools
import struct
from typing import Any, final

MAX_OPCODES = 100_000  # 1024 images with references, prompts and GenEval's metadata have 67,000
MAX_TEXT_BYTES = 2**20  # decoding a text holds up all other threads
PIECE = 2**20  # bytes that are copied at once

# The known opcodes and the bytes of their arguments: what Python 3 writes for None, bool, int, float, str, bytes, list,
# tuple and dict in protocols 3 to 5.
_ARGUMENT = {
    pickle.PROTO: 1, pickle.FRAME: 8, pickle.STOP: 0, pickle.MARK: 0,
    pickle.MEMOIZE: 0, pickle.BINPUT: 1, pickle.LONG_BINPUT: 4, pickle.BINGET: 1, pickle.LONG_BINGET: 4,
    pickle.NONE: 0, pickle.NEWTRUE: 0, pickle.NEWFALSE: 0,
    pickle.BININT: 4, pickle.BININT1: 1, pickle.BININT2: 2, pickle.LONG1: 1, pickle.BINFLOAT: 8,
    pickle.SHORT_BINUNICODE: 1, pickle.BINUNICODE: 4, pickle.BINUNICODE8: 8,
    pickle.SHORT_BINBYTES: 1, pickle.BINBYTES: 4, pickle.BINBYTES8: 8,
    pickle.EMPTY_LIST: 0, pickle.APPEND: 0, pickle.APPENDS: 0,
    pickle.EMPTY_DICT: 0, pickle.SETITEM: 0, pickle.SETITEMS: 0,
    pickle.EMPTY_TUPLE: 0, pickle.TUPLE: 0, pickle.TUPLE1: 0, pickle.TUPLE2: 0, pickle.TUPLE3: 0,
}  # fmt: skip
# How many items these take from the stack to put them into a collection; None = all down to the last mark.
_ITEMS = {
    pickle.APPEND: 1, pickle.APPENDS: None, pickle.SETITEM: 2, pickle.SETITEMS: None,
    pickle.TUPLE: None, pickle.TUPLE1: 1, pickle.TUPLE2: 2, pickle.TUPLE3: 3,
}  # fmt: skip


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
        ValueError: expected plain data, got the opcode STACK_GLOBAL.
    """
    try:
        return _run(_Program(body))
    except (IndexError, KeyError) as error:  # an empty stack; nothing in the memo
        raise ValueError(f"expected a pickle of plain data ({type(error).__name__}: {error}).") from None


@final
class _Program:
    """The bytes of a pickle, read from front to back."""

    def __init__(self, body: bytes) -> None:
        self._body, self._position = body, 0

    def take(self, size: int) -> bytes:
        """The next bytes."""
        start, self._position = self._position, self._position + size
        if self._position > len(self._body):
            raise ValueError("expected a pickle, got one that ends early.")
        if size <= PIECE:
            return self._body[start : self._position]
        # Python lets other threads run while it joins, but not while it slices
        pieces = range(start, self._position, PIECE)
        return b"".join([self._body[piece : min(piece + PIECE, self._position)] for piece in pieces])

    def step(self) -> tuple[bytes, bytes]:
        """The next opcode and its argument."""
        code = self.take(1)
        if code not in _ARGUMENT:
            names = {opcode.code: opcode.name for opcode in pickletools.opcodes}
            raise ValueError(f"expected plain data, got the opcode {names.get(code.decode('latin-1'), code.hex())}.")
        return code, self.take(_ARGUMENT[code])


def _run(program: _Program) -> Any:
    stack: list[Any] = []
    below: list[list[Any]] = []  # what lay on the stack at each mark
    memo: dict[int, Any] = {}
    for _ in range(MAX_OPCODES):
        code, argument = program.step()
        if code in _ITEMS:
            count = _ITEMS[code]
            if count is None:
                items, stack = stack, below.pop()
            else:
                items = [stack.pop() for _ in range(count)][::-1]
            _collect(code, items, stack)
            continue
        match code:
            case pickle.PROTO | pickle.FRAME:
                pass
            case pickle.MARK:
                below.append(stack)
                stack = []
            case pickle.MEMOIZE:
                memo[len(memo)] = stack[-1]
            case pickle.BINPUT | pickle.LONG_BINPUT:
                memo[int.from_bytes(argument, "little")] = stack[-1]
            case pickle.BINGET | pickle.LONG_BINGET:
                stack.append(memo[int.from_bytes(argument, "little")])
            case pickle.STOP:
                return stack.pop()
            case _:
                stack.append(_value(code, argument, program))
    raise ValueError(f"expected a pickle of at most {MAX_OPCODES} opcodes.")


def _collect(code: bytes, items: list[Any], stack: list[Any]) -> None:
    """Put items into the collection on top of the stack, or into a new tuple."""
    if code in (pickle.APPEND, pickle.APPENDS):
        if type(stack[-1]) is not list:
            raise ValueError("expected a list to append to.")
        stack[-1].extend(items)
    elif code in (pickle.SETITEM, pickle.SETITEMS):
        target = stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise ValueError("expected a dictionary, keys and values.")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str or key in target:
                raise ValueError("expected dictionaries whose keys are texts, each once.")
            target[key] = value
    else:
        stack.append(tuple(items))


def _value(code: bytes, argument: bytes, program: _Program) -> Any:
    """What an opcode puts on the stack."""
    match code:
        case pickle.NONE:
            return None
        case pickle.NEWTRUE | pickle.NEWFALSE:
            return code == pickle.NEWTRUE
        case pickle.EMPTY_LIST:
            return []
        case pickle.EMPTY_DICT:
            return {}
        case pickle.EMPTY_TUPLE:
            return ()
        case pickle.BINFLOAT:
            return struct.unpack(">d", argument)[0]
        case pickle.BININT:
            return int.from_bytes(argument, "little", signed=True)
        case pickle.BININT1 | pickle.BININT2:
            return int.from_bytes(argument, "little")
        case _:
            size = int.from_bytes(argument, "little")
    if code in (pickle.SHORT_BINBYTES, pickle.BINBYTES, pickle.BINBYTES8):
        return program.take(size)
    if code == pickle.LONG1:
        return int.from_bytes(program.take(size), "little", signed=True)
    if size > MAX_TEXT_BYTES:
        raise ValueError(f"expected texts of at most {MAX_TEXT_BYTES} bytes, got {size}.")
    return program.take(size).decode("utf-8", "surrogatepass")
