"""Pickles from strangers build plain data and do nothing else."""

import collections
import datetime
import os
import pickle
import pickletools
import subprocess
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iqareward.serving import plain_pickle
from iqareward.serving.plain_pickle import PLAIN_OPCODES, loads_plain

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
PLAIN = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner), max_leaves=20
)


class Call:
    """Runs a function when it is unpickled."""

    def __init__(self, function, *arguments) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def exploits(marker: Path) -> dict[str, bytes]:
    """Payloads that would leave a file behind, in every way that a pickle can name or call something."""
    command = f"touch {marker}"
    os_system, path, touch = b"cposix\nsystem\n", str(marker).encode(), command.encode()
    return {
        "os.system": pickle.dumps(Call(os.system, command)),
        "os.system, protocol 0": pickle.dumps(Call(os.system, command), 0),
        "subprocess": pickle.dumps(Call(subprocess.check_call, ["touch", str(marker)])),
        "builtins.eval": pickle.dumps(Call(eval, f"open({str(marker)!r}, 'w')")),
        "builtins.exec, nested": pickle.dumps({"images": [b"", Call(exec, f"open({str(marker)!r}, 'w')")]}),
        "hidden behind a legal document": pickle.dumps({"images": [b"x"]})[:-1]
        + b"0" + os_system + b"(V" + touch + b"\ntR.",
        "global": os_system + b"(S'touch " + path + b"'\ntR.",
        "inst": b"(S'touch " + path + b"'\niposix\nsystem\n.",
        "obj": b"(" + os_system + b"S'touch " + path + b"'\no.",
        "newobj": b"\x80\x02" + os_system + b"(U\x01xt\x81.",
        "stack global": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c"
        + bytes([len(touch)]) + touch + b"\x85R.",
        "extension": b"\x80\x02\x82\x01.",
        "persistent id": b"\x80\x02U\x01xQ.",
        "persistent id, text": b"Px\n.",
        "build": b"\x80\x02}}b.",
        "numpy array": pickle.dumps({"images": np.zeros(2)}),
        "numpy scalar": pickle.dumps(np.float32(1)),
        "torch tensor": pickle.dumps(torch.zeros(2)),
        "set": pickle.dumps({1, 2}),
        "bytearray": pickle.dumps(bytearray(b"x"), 5),
        "out-of-band buffer": b"\x80\x05\x97.",
        "date": pickle.dumps(datetime.date(2026, 1, 1)),
        "ordered dictionary": pickle.dumps(collections.OrderedDict(a=1)),
        "decimal": pickle.dumps(Decimal(1)),
    }  # fmt: skip


@pytest.mark.parametrize("name", exploits(Path("x")))
def test_exploits_are_blocked(name, tmp_path):
    """Nothing is imported, called or built, and the error names the opcode."""
    marker = tmp_path / "exploited"
    with pytest.raises(ValueError, match=r"expected plain data, got the opcode [A-Z_0-9]+, which could run code"):
        loads_plain(exploits(marker)[name])
    assert not marker.exists()


def test_the_exploits_are_real(tmp_path):
    """The payloads that name a function do leave the file behind when Python's own unpickler reads them."""
    for name in ("os.system", "os.system, protocol 0", "builtins.eval", "hidden behind a legal document", "global",
                 "inst", "stack global"):  # fmt: skip
        marker = tmp_path / name.replace(" ", "_").replace(",", "")
        subprocess.run(["python3", "-c", "import pickle, sys; pickle.load(sys.stdin.buffer)"],
                       input=exploits(marker)[name], check=True)  # fmt: skip
        assert marker.exists(), name


def test_second_wall(monkeypatch):
    """Were an opcode on the list by mistake, the unpickler behind it would still find no name."""
    monkeypatch.setattr(plain_pickle, "PLAIN_OPCODES", {opcode.name for opcode in pickletools.opcodes})
    for payload in (pickle.dumps(print), pickle.dumps(Call(os.getpid)), b"\x80\x02U\x01xQ."):
        with pytest.raises(ValueError, match=r"expected plain data, got a (persistent )?reference"):
            loads_plain(payload)


@settings(max_examples=300, deadline=None)
@given(PLAIN, st.integers(3, 5))
def test_plain_data_survives(document, protocol):
    """What the dialects send comes back as it was, from every protocol of Python 3 clients."""
    assert loads_plain(pickle.dumps(document, protocol)) == document


@settings(max_examples=1000, deadline=None)
@given(st.binary(max_size=200) | st.builds(lambda d, i, b: d[:i] + b + d[i + 1 :], PLAIN.map(pickle.dumps),
                                           st.integers(0, 100), st.binary(max_size=3)))  # fmt: skip
def test_any_bytes(body):
    """Random bytes and damaged pickles give plain data or a ValueError, and nothing else."""
    try:
        document = loads_plain(body)
    except ValueError:
        return
    assert isinstance(document, type(None) | bool | int | float | str | bytes | list | tuple | dict)


def test_bombs():
    """Small bodies that ask for much memory or time are refused before anything is allocated."""
    with pytest.raises(ValueError, match="LONG_BINPUT"):
        loads_plain(b"\x80\x02]r\xff\xff\xff\xff.")
    with pytest.raises(ValueError, match="at most 50000 opcodes"):
        loads_plain(b"\x80\x02]" + b"(" * 60_000 + b".")
    with pytest.raises(ValueError):
        loads_plain(b"\x80\x04\x8e" + (2**60).to_bytes(8, "little") + b"x.")
    assert "REDUCE" not in PLAIN_OPCODES
