"""Pickles that would run code, or take all memory or time: each is proven to work on plain pickle, and refused here."""

from __future__ import annotations

import copyreg
import io
import pickle
import resource
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from registry.data import safe_pickle
from registry.data.feature_file import read_feature_file
from registry.errors import InputError, printable

ran: list[str] = []
"""what gadgets append to"""


def run_code(*_: Any, **__: Any) -> None:
    """What an attacker would call."""
    ran.append("code")


class WithState:
    """Runs code when a pickle gives it a state."""

    def __setstate__(self, state: Any) -> None:
        run_code()


class WithSlot:
    """Runs code when a pickle sets an attribute."""

    __slots__ = ("_value",)

    def __setattr__(self, name: str, value: Any) -> None:
        run_code()


class WhenMade:
    """Runs code when it is made, also without its class being called."""

    def __new__(cls, *_: Any, **__: Any) -> WhenMade:
        run_code()
        return super().__new__(cls)


class FromOutside(pickle._Unpickler):  # type: ignore[name-defined, misc]
    """A loader with objects outside the file, as torch's is."""

    def persistent_load(self, pid: Any) -> None:
        run_code()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def named(name: str, module: str = __name__) -> bytes:
    return b"c" + f"{module}\n{name}\n".encode()


def array_of(item: bytes) -> bytes:
    """An object array that holds what `item` makes."""
    head = b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntC\x01btR"
    return head + b"(I1\n(I1\ntcnumpy\ndtype\n(VO8\nI00\nI01\ntR(I3\nV|\nNNNI-1\nI-1\nI63\ntbI00\n(" + item + b"ltb"


CALL = named("run_code") + b")R"
P = b"\x80\x04"
GADGETS: dict[str, bytes] = {
    "GLOBAL, REDUCE": CALL + b".",
    "STACK_GLOBAL": P + text(__name__) + text("run_code") + b"\x93)R.",
    "STACK_GLOBAL of the memo": P + text(__name__) + b"\x940" + text("run_code") + b"\x940h\x00h\x01\x93)R.",
    "a dotted name": P + text(__name__) + text("WithState.__setstate__") + b"\x93NN\x86R.",
    "attributes of builtins": P + text("builtins") + text("getattr") + b"\x93" + named("WithState")
        + b"V__setstate__\n\x86RNN\x86R.",
    "INST": b"(i" + f"{__name__}\nrun_code\n".encode() + b".",
    "OBJ": b"(" + named("run_code") + b"o.",
    "NEWOBJ": P + named("WhenMade") + b")\x81.",
    "NEWOBJ_EX": P + named("WhenMade") + b")}\x92.",
    "BUILD by __setstate__": b"ccopyreg\n__newobj__\n(" + named("WithState") + b"tRNb.",
    "BUILD by slots": b"ccopyreg\n__newobj__\n(" + named("WithSlot") + b"tR(N}V_value\nI1\nstb.",
    "BUILD of an admitted object": CALL + b"0cnumpy\nndarray\n}V__call__\nI1\nsb.",
    "copyreg._reconstructor": b"ccopyreg\n_reconstructor\n(" + named("WhenMade") + named("WhenMade") + b"NtR.",
    "EXT1": P + b"\x82\xf0)R.",
    "EXT2": P + b"\x83\xf0\xf0)R.",
    "EXT4": P + b"\x84\xf0\xf0\xf0\x70)R.",
    "PERSID": b"Pkey\n.",
    "BINPERSID": b"Vkey\nQ.",
    "in a list in a dict": P + b"}" + text("train") + b"](" + CALL + b"es.",
    "a key": P + b"}" + CALL + b"Ns.",
    "a member of a set": P + b"\x8f(" + CALL + b"\x90.",
    "popped": P + CALL + b"0N.",
    "in an object array": array_of(CALL) + b".",
    "a pickle in an object array": array_of(b"cpickle\nloads\n(C" + bytes([len(CALL) + 1]) + CALL + b".tR") + b".",
    "functools.partial": b"cfunctools\npartial\n(" + named("run_code") + b"tR)R.",
    "eval": b"cbuiltins\neval\n(V__import__('" + __name__.encode() + b"', fromlist=['x']).run_code()\ntR.",
    "exec, Python 2's name": b"c__builtin__\nexec\n(Vfrom " + __name__.encode() + b" import run_code; run_code()\ntR.",
    "timeit": b"ctimeit\ntimeit\n(Vrun_code()\nVfrom " + __name__.encode()
        + b" import run_code\nctimeit\ndefault_timer\nI1\ntR.",
    "map and list": b"cbuiltins\nlist\n(cbuiltins\nmap\n(" + named("run_code") + b"(I1\nltRtR.",
    "numpy's apply": b"cnumpy\napply_along_axis\n(" + named("run_code") + b"I0\n(I1\nltR.",
    "an error after it": P + CALL + b"\xff",
}  # fmt: skip
NAMES = [
    ("os", "system"), ("posix", "system"), ("nt", "system"), ("subprocess", "Popen"), ("subprocess", "check_output"),
    ("runpy", "run_path"), ("runpy", "_run_code"), ("importlib", "import_module"), ("pydoc", "pipepager"),
    ("pydoc", "locate"), ("timeit", "timeit"), ("webbrowser", "open"), ("ctypes", "CDLL"), ("ctypes", "string_at"),
    ("_ctypes", "call_function"), ("builtins", "open"), ("builtins", "__import__"), ("builtins", "getattr"),
    ("builtins", "setattr"), ("builtins", "type"), ("builtins", "object"), ("builtins", "memoryview"), ("io", "open"),
    ("_io", "FileIO"), ("shutil", "rmtree"), ("socket", "create_connection"), ("pickle", "loads"), ("_pickle", "loads"),
    ("marshal", "loads"), ("types", "CodeType"), ("types", "FunctionType"), ("operator", "attrgetter"),
    ("operator", "methodcaller"), ("functools", "partial"), ("functools", "reduce"), ("itertools", "starmap"),
    ("codecs", "decode"), ("codecs", "open"), ("_codecs", "decode"), ("_codecs", "register"), ("copyreg", "__newobj__"),
    ("copyreg", "_reconstructor"), ("copyreg", "add_extension"), ("logging.config", "dictConfig"), ("asyncio", "run"),
    ("multiprocessing.reduction", "_rebuild_socket"), ("numpy", "load"), ("numpy", "fromfile"), ("numpy", "memmap"),
    ("numpy", "core.multiarray.fromfile"), ("numpy.testing._private.utils", "runstring"), ("numpy", "f2py.compile"),
    ("numpy.f2py.crackfortran", "param_eval"), ("numpy", "ndarray.__class__"), ("numpy", "dtype.__subclasses__"),
    ("numpy", "_core.multiarray._reconstruct.__globals__"), ("torch", "load"), ("torch.storage", "_load_from_bytes"),
    ("torch._utils", "_rebuild_tensor_v2"), ("torch", "FloatStorage"), ("torch.jit", "load"), ("pandas", "read_pickle"),
    ("pandas.core.computation.eval", "eval"), ("joblib", "load"), ("dill", "loads"), ("code", "interact"),
    ("code", "InteractiveInterpreter"), ("cProfile", "run"), ("pdb", "run"), ("trace", "Trace"), ("test", "support"),
    ("venv", "create"), ("pip", "main"), ("ensurepip", "bootstrap"), ("antigravity", "geohash"), ("this", "s"),
    ("registry.data.safe_pickle", "load_pickle"), ("registry", "run"), (__name__, "run_code"),
]  # fmt: skip


def refusal(path: Path, content: bytes) -> str:
    """Return what is said of a file, which must be said soon and in one line."""
    path.write_bytes(content)
    started = time.process_time()
    with pytest.raises(InputError) as caught:
        read_feature_file(path, label_range=3.0)
    assert time.process_time() - started < 5
    message = str(caught.value).replace(str(path), "FILE")
    assert len(message) < 5000
    assert message == printable(message)
    return message


@pytest.fixture
def extension():
    """The codes of EXT1, EXT2 and EXT4 stand for a function, as a program may have it."""
    codes = (0xF0, 0xF0F0, 0x70F0F0F0)
    try:
        for number, code in enumerate(codes):
            copyreg.add_extension(__name__, "run_code" if number == 0 else f"same_{number}", code)
        yield
    finally:
        for number, code in enumerate(codes):
            copyreg.remove_extension(__name__, "run_code" if number == 0 else f"same_{number}", code)


same_1 = same_2 = run_code  # an object has one code, by its name


@pytest.mark.parametrize("name", GADGETS)
def test_a_gadget_runs_under_pickle_and_never_here(tmp_path, name, extension):
    ran.clear()
    with suppress(Exception):  # some do what they do, and break then
        FromOutside(io.BytesIO(GADGETS[name])).load()
    assert ran, "the gadget is none: the test would show nothing"
    ran.clear()
    message = refusal(tmp_path / "x.pkl", GADGETS[name])
    assert ran == []
    assert "\n" not in message
    assert "asks to load" in message or "is not a pickle" in message


@pytest.mark.parametrize(("module", "name"), NAMES)
@pytest.mark.parametrize("how", ["GLOBAL", "STACK_GLOBAL", "INST"])
def test_a_name_is_refused_before_anything_is_imported(tmp_path, module, name, how):
    content = {
        "GLOBAL": named(name, module) + b"N\x85R.",
        "STACK_GLOBAL": P + text(module) + text(name) + b"\x93N\x85R.",
        "INST": b"(i" + f"{module}\n{name}\n".encode() + b".",
    }[how]
    loaded = set(sys.modules)
    shown = f"{module}.{name}"
    assert refusal(tmp_path / "x.pkl", content).startswith(f"FILE asks to load {shown!r}; a feature file may hold")
    assert set(sys.modules) == loaded


def test_what_is_admitted_is_no_more_than_that():
    """Whoever adds a name sees this list: each can be called with anything, and changed by nothing."""
    names = {name.replace("._core.", ".core.") for name in safe_pickle._ADMITTED}
    multiarray = {
        f"numpy.core.{name}" for name in ("multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer")
    }
    containers = {f"builtins.{name}" for name in ("bytes", "bytearray", "set", "frozenset", "list", "dict", "tuple")}
    others = {"numpy.ndarray", "numpy.dtype", "_codecs.encode", "collections.OrderedDict", "collections.defaultdict"}
    assert names == multiarray | containers | others


@pytest.mark.parametrize(
    "content",
    [
        b"c_codecs\nencode\n(Vx\nVrot13\ntR.",
        b"c_codecs\nencode\n(C\x01xVlatin1\ntR.",
        b"cnumpy\ndtype\n(VO8\ntR(I3\nV|\n(Vos\nltNNI-1\nI-1\nI63\ntb.",
        b"cnumpy\ndtype\n(VV8\ntR.",
        b"cnumpy\ndtype\n(VM8[s]\ntR.",
        b"cnumpy._core.multiarray\n_reconstruct\n(" + named("WhenMade") + b"(I0\ntC\x01btR.",
        b"cnumpy._core.multiarray\nscalar\n(cnumpy\ndtype\n(VO8\ntRNtR.",
        P + b"\x97.",
        P + b"Vx\n\x98.",
        P + b"\x95" + struct.pack("<Q", 2**62) + b"N.",
        P + b"C\x08AAAAAAAA\x98\x940h\x00.",
    ],
)
def test_tricks_with_what_is_admitted(tmp_path, content):
    ran.clear()
    refusal(tmp_path / "x.pkl", content)
    assert ran == []


# --- memory and time


def collisions(count: int) -> list[bytes]:
    """Numbers that have one hash, as pickles."""
    return [b"\x8a\x0b" + (number * sys.hash_info.modulus).to_bytes(11, "little") for number in range(1, count + 1)]


def split(**parts: bytes) -> bytes:
    parts = {"id": b"(Va\nl", "regression_labels": b"(G" + struct.pack(">d", 1.0) + b"l", **parts}
    return b"}(" + b"".join(text(key) + value for key, value in parts.items()) + b"u"


def whole(**parts: bytes) -> bytes:
    return P + b"}(" + b"".join(text(name) + split(**parts) for name in ("train", "valid", "test")) + b"u."


def array(dtype: str, shape: tuple[int, ...], data: bytes = b"C\x00") -> bytes:
    lengths = b"".join(b"L%dL\n" % length for length in shape)
    head = b"cnumpy._core.multiarray\n_reconstruct\n)R(I1\n(" + lengths + b"tcnumpy\ndtype\n(V"
    return head + dtype.encode() + b"\ntR\x89" + data + b"tb"


FLOATS = b"cnumpy._core.multiarray\n_reconstruct\n)R(I1\n(I100000\ntcnumpy\ndtype\n(Vf4\ntR\x89B"
FLOATS += struct.pack("<I", 400_000) + bytes(400_000) + b"tb"
LONG = text("x" * 300_000)
UNFOLDING = b"]" + b"".join(b"q" + bytes([n]) + b"0(" + b"h" + bytes([n]) + b"h" + bytes([n]) + b"l" for n in range(60))
BOMBS: dict[str, Callable[[], bytes]] = {
    "keys that collide": lambda: P + b"}(" + b"N".join(collisions(60_000)) + b"Nu.",
    "members that collide": lambda: P + b"\x8f(" + b"".join(collisions(60_000)) + b"\x90.",
    "members of a frozenset": lambda: P + b"(" + b"".join(collisions(60_000)) + b"\x91.",
    "members of a called set": lambda: P + b"cbuiltins\nset\n((" + b"".join(collisions(60_000)) + b"ltR.",
    "pairs that collide": lambda: P + b"cbuiltins\ndict\n(("
        + b"".join(b"(%bNt" % number for number in collisions(40_000)) + b"ltR.",
    "places of the memo that collide": lambda: b"N"
        + b"".join(b"p%d\n" % (number * sys.hash_info.modulus) for number in range(40_000)) + b".",
    "a key of very many tuples": lambda: P + b"})" + b"\x85" * 300_000 + b"Ns.",
    "very many lists": lambda: P + b"]" * 300_000 + b"a" * 299_999 + b".",
    "very many tuples": lambda: P + b")" + b"\x85" * 300_000 + b".",
    "object arrays in one another": lambda: P + b"N" + b"".join(
        b"\x85q\x000cnumpy._core.multiarray\n_reconstruct\n)R(I1\n(I1\ntcnumpy\ndtype\n(VO8\ntR\x89cbuiltins\nlist\n(h\x00tRtb"
        for _ in range(5000)) + b".",
    "BYTEARRAY8 of 16 GB": lambda: P + b"\x96" + struct.pack("<Q", 1 << 34) + b".",
    "BINBYTES8 of 16 GB": lambda: P + b"\x8e" + struct.pack("<Q", 1 << 34) + b".",
    "BINUNICODE8 of 2^63": lambda: P + b"\x8d" + struct.pack("<Q", 1 << 63) + b".",
    "LONG4 of 2 GB": lambda: P + b"\x8b" + struct.pack("<i", 2**31 - 1) + b".",
    "FRAME of 2^62": lambda: P + b"\x95" + struct.pack("<Q", 1 << 62) + b".",
    "a memo of 64 GB": lambda: b"\x80\x02]r\xff\xff\xff\xff.",
    "copies of a bytearray": lambda: P + b"cbuiltins\nbytearray\nq\x00B" + struct.pack("<I", 500_000) + bytes(500_000)
        + b"\x85q\x010](" + b"h\x00h\x01R" * 60_000 + b"e.",
    "copies of a list": lambda: P + b"cbuiltins\nlist\nq\x00(" + b"N" * 400_000 + b"t\x85q\x010]("
        + b"h\x00h\x01R" * 60_000 + b"e.",
    "copies of a text": lambda: P + b"c_codecs\nencode\nq\x00" + LONG + b"Vlatin1\n\x86q\x010]("
        + b"h\x00h\x01R" * 90_000 + b"e.",
    "copies by OBJ": lambda: P + LONG + b"q\x000](" + b"(cbuiltins\ntuple\nh\x00o" * 20_000 + b"e.",
    "a shape of long numbers": lambda: P + b"cnumpy._core.multiarray\n_reconstruct\n)R(I1\n"
        + b"\x8b" + struct.pack("<i", 100_000) + b"\x01" * 100_000 + b"q\x020(" + b"h\x02" * 2000
        + b"tcnumpy\ndtype\n(Vf4\ntR\x89C\x00tb.",
    "a billion laughs": lambda: whole(audio=UNFOLDING),
    "a long text among numbers": lambda: whole(audio=b"(" + LONG + b"\x8c\x01a" * 90_000 + b"l"),
    "a long text a thousand times": lambda: whole(id=LONG + b"q\x000(" + b"h\x00" * 90_000 + b"l"),
    "an array a thousand times": lambda: whole(audio=FLOATS + b"q\x000(" + b"h\x00" * 9_000 + b"l"),
    "a bytearray a thousand times": lambda: whole(audio=b"\x96" + struct.pack("<Q", 300_000) + bytes(300_000)
        + b"q\x000(" + b"h\x00" * 90_000 + b"l"),
    "rows of nothing": lambda: whole(id=array("f4", (2**28, 0))),
    "objects of rows of nothing": lambda: whole(audio=array("O8", (2**28, 0), b"]")),
    "texts of no width": lambda: whole(id=array("S0", (2**28,))),
    "a list that holds itself": lambda: whole(audio=b"]q\x00(" + b"h\x00" * 1000 + b"e"),
    "an id of a megabyte": lambda: whole(id=b"(" + text("\x1b[2J" + "x" * 600_000) + b"l"),
    "a number of a megabyte": lambda: whole(id=b"(\x8b" + struct.pack("<i", 600_000) + b"\x01" * 600_000 + b"l"),
}  # fmt: skip


@pytest.fixture
def a_gigabyte():
    """Let this process take a gigabyte more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's account of memory")
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_soon_and_in_little_memory(tmp_path, name, a_gigabyte):
    content = BOMBS[name]()
    assert len(content) < 2_000_000
    assert "does not fit into memory" not in refusal(tmp_path / "x.pkl", content)


def test_keys_that_are_no_text_and_sets_are_left_out(tmp_path):
    path = tmp_path / "x.pkl"
    inner = {1: "a", 2.5: "b", (1, 2): "c", None: "d", "kept": {1, 2}, "frozen": frozenset("ab")}
    path.write_bytes(pickle.dumps({"x": inner}))
    assert safe_pickle.load_pickle(path) == {"x": {"kept": frozenset(), "frozen": frozenset()}}


# --- damage


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_every_length_of_a_small_file_is_read_or_refused(tmp_path, protocol):
    kept = {"id": ["a"], "regression_labels": np.zeros(1, np.float32), "audio": np.zeros((1, 1, 1), np.float32)}
    content = pickle.dumps({name: {**kept, "id": [name]} for name in ("train", "valid", "test")}, protocol=protocol)
    path = tmp_path / "x.pkl"
    path.write_bytes(content)
    assert read_feature_file(path, label_range=3.0).splits["test"].ids == ["test"]
    for length in range(len(content)):
        refusal(path, content[:length])


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_every_byte_of_a_small_file_flipped_is_read_or_refused(tmp_path, protocol):
    kept = {"id": ["a"], "regression_labels": np.zeros(1, np.float32), "audio": np.zeros((1, 1, 1), np.float32)}
    content = pickle.dumps({name: {**kept, "id": [name]} for name in ("train", "valid", "test")}, protocol=protocol)
    path = tmp_path / "x.pkl"
    for place in range(len(content)):
        for bit in (0, 3, 5, 7):
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            path.write_bytes(changed)
            try:
                read_feature_file(path, label_range=3.0)
            except InputError as error:
                assert len(str(error)) < 5000  # noqa: PT017
