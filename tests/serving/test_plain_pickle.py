"""Pickles from strangers build plain data and do nothing else."""

import collections
import datetime
import json
import os
import pickle
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iqareward.serving.plain_pickle import loads_plain

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
    with pytest.raises(ValueError, match=r"expected plain data, got the opcode [A-Z_0-9]+\."):
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


def test_a_thousand_images_with_everything():
    """1024 images with references, prompts and GenEval's metadata pass, whoever shares texts with whom."""
    thing = {"class": "bench", "count": 1, "color": "red"}
    metadata = {"tag": "two_object", "include": [thing, thing], "exclude": [], "prompt": "a bench", "seed": 2**40}
    body = {
        "images": [b"%d" % i for i in range(1024)],
        "ref_images": [b"%d reference" % i for i in range(1024)],
        "prompts": tuple(f"prompt {i}" for i in range(1024)),
        "metadatas": [json.loads(json.dumps(metadata)) for _ in range(1024)],
        "only_strict": True,
    }
    for protocol in (3, 4, 5):
        assert loads_plain(pickle.dumps(body, protocol)) == body


PAIRS = b"".join(b"h%ch%c\x86\x94" % (i, i) for i in range(60))  # 60 tuples, each of the one before, twice
COLLIDING = b"".join(b"\x8a\x0c" + (i * sys.hash_info.modulus).to_bytes(12, "little") + b"N" for i in range(1, 25_000))
BOMBS = {
    "key that is hashed in 2^60 steps": (b"\x80\x04)\x94" + PAIRS + b"}h\x3cNs.", "keys are texts"),
    "keys with one hash": (b"\x80\x04}(" + COLLIDING + b"u.", "keys are texts"),
    "key that comes twice": (b"\x80\x04}(\x8c\x01aN\x8c\x01aNu.", "each once"),
    "marks without end": (b"\x80\x02]" + b"(" * 200_000 + b".", "at most 100000 opcodes"),
    "bytes that are not there": (b"\x80\x04\x8e" + (2**60).to_bytes(8, "little") + b"x.", "ends early"),
    "text that is not there": (b"\x80\x04\x8d" + (2**60).to_bytes(8, "little") + b"x.", "texts of at most"),
    "text of a megabyte": (pickle.dumps("x" * (2**20 + 1)), "texts of at most"),
    "integer of a kilobyte": (pickle.dumps(2**8192), "LONG4"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(name):
    """Small bodies that ask for much memory or time are refused at once."""
    body, message = BOMBS[name]
    with pytest.raises(ValueError, match=message):
        loads_plain(body)


def test_large_files():
    """Bytes that are read in pieces come back whole, whatever their length is."""
    body = [bytes(range(256)) * 2**14 + bytes(rest) for rest in (0, 1, 2**20 - 1)]
    assert loads_plain(pickle.dumps(body)) == body


def test_large_numbers_in_the_memo_cost_nothing():
    """Python's machine makes room for as many entries as the number says."""
    assert loads_plain(b"\x80\x02]r\xff\xff\xff\xff.") == []


@pytest.mark.parametrize(
    "nesting", [b"]" * 40_000 + b"a" * 39_999, b"N" + b"\x85" * 90_000, b"]\x94" + b"h\0a" * 40_000]
)
def test_deep_nesting(nesting):
    """Lists and tuples in one another, and a list in itself, are built and freed without recursion."""
    assert len(loads_plain(b"\x80\x04" + nesting + b".")) >= 1
