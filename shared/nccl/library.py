"""libnccl: where it is, and the functions of it that meshes need.

Invariant: a process has one libnccl. Whichever is loaded first stays - a library that torch brings along later has the
same SONAME, and the loader then takes the one that is there - so services load theirs before torch (`preload`), and
`find` never names another one afterwards.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Mapping, MutableMapping
from functools import cache
from pathlib import Path

SONAME = "libnccl.so.2"
VARIABLE = "ORRERY_NCCL_LIBRARY"
"""Path of the library that a service has loaded, for the processes that it starts: they load the same one."""
INTERFACE_VARIABLE = "NCCL_SOCKET_IFNAME"
ID_BYTES = 128

SUCCESS, IN_PROGRESS = 0, 7
"""ncclResult_t; everything else is an error."""
UINT8, SUM = 1, 0
"""ncclUint8 and ncclSum."""

_CONFIG_MAGIC, _CONFIG_VERSION = 0xCAFEBEEF, 21400
OLDEST = (2, 18)
"""Before that, aborting a communicator that does not block was unsafe while it formed."""


class NcclError(Exception):
    """NCCL is missing, or refused something, or a wait for it ran out."""


class _UniqueId(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_char * ID_BYTES)]


class _Config(ctypes.Structure):
    """The head of ncclConfig_t, as of 2.14: newer libraries take their defaults for what comes after it."""

    _fields_ = [
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
    ]


class Library:
    """One libnccl. What returns a code returns NCCL's own; a handle is the address of a communicator."""

    def __init__(self, path: str) -> None:
        """NcclError if `path` is no libnccl, or an old one."""
        self.path = path
        try:
            self._c = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
            self._declare()
        except (OSError, AttributeError) as error:
            raise NcclError(
                f"expected NCCL's library at {path}: {error}; install nvidia-nccl-cu13 (or -cu12), or set "
                "weights.nccl_library to a file that exists"
            ) from error
        number = ctypes.c_int()
        self.check(self._c.ncclGetVersion(ctypes.byref(number)), "ncclGetVersion")
        self._number = number.value
        if (self._number // 10000, self._number // 100 % 100) < OLDEST:
            raise NcclError(
                f"expected NCCL {'.'.join(map(str, OLDEST))} or newer, got {self.version} at {path}: set "
                "weights.nccl_library to a newer one"
            )

    @property
    def version(self) -> str:
        """ "2.32.3" """
        return f"{self._number // 10000}.{self._number // 100 % 100}.{self._number % 100}"

    def unique_id(self) -> bytes:
        """A new id. From now on a thread and a socket of this process wait for its ranks, for as long as it lives."""
        made = _UniqueId()
        self.check(self._c.ncclGetUniqueId(ctypes.byref(made)), "ncclGetUniqueId")
        return ctypes.string_at(ctypes.byref(made), ID_BYTES)

    def begin(self, size: int, unique_id: bytes, rank: int) -> tuple[int, int]:
        """Begin to form a communicator that never blocks, on the current CUDA device; the code, and its handle."""
        handle = ctypes.c_void_p()
        config = _Config(ctypes.sizeof(_Config), _CONFIG_MAGIC, _CONFIG_VERSION, 0)
        given = _UniqueId.from_buffer_copy(unique_id)
        code = self._c.ncclCommInitRankConfig(ctypes.byref(handle), size, given, rank, ctypes.byref(config))
        return code, handle.value or 0

    def state(self, handle: int) -> int:
        """What has become of the last call: SUCCESS, IN_PROGRESS, or its error."""
        state = ctypes.c_int()
        code = self._c.ncclCommGetAsyncError(handle, ctypes.byref(state))
        return code or state.value

    def abort(self, handle: int) -> int:
        """End whatever the communicator is busy with, here, and free it. No other thread may use the handle."""
        return self._c.ncclCommAbort(handle)

    def broadcast(self, handle: int, pointer: int, count: int, root: int, stream: int) -> int:
        """Bytes, in place."""
        return self._c.ncclBroadcast(pointer, pointer, count, UINT8, root, handle, stream)

    def send(self, handle: int, pointer: int, count: int, peer: int, stream: int) -> int:
        """Bytes."""
        return self._c.ncclSend(pointer, count, UINT8, peer, handle, stream)

    def recv(self, handle: int, pointer: int, count: int, peer: int, stream: int) -> int:
        """Bytes."""
        return self._c.ncclRecv(pointer, count, UINT8, peer, handle, stream)

    def all_reduce(self, handle: int, pointer: int, count: int, dtype: int, stream: int) -> int:
        """Sum, in place; `dtype` is an ncclDataType_t."""
        return self._c.ncclAllReduce(pointer, pointer, count, dtype, SUM, handle, stream)

    def explain(self, code: int) -> str:
        """An error of NCCL in its own words, with the last one that it wrote down."""
        general = (self._c.ncclGetErrorString(code) or b"").decode(errors="replace")
        last = (self._c.ncclGetLastError(None) or b"").decode(errors="replace").strip()
        return f"{general} ({last})" if last else general

    def check(self, code: int, what: str) -> None:
        """NcclError for what is an error."""
        if code not in (SUCCESS, IN_PROGRESS):
            raise NcclError(f"{what}: {self.explain(code)}")

    def _declare(self) -> None:
        """Types of the arguments: ctypes would pass addresses as 32-bit integers."""
        pointer, count, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        for name, arguments in {
            "ncclGetVersion": [pointer],
            "ncclGetUniqueId": [pointer],
            "ncclCommInitRankConfig": [pointer, number, _UniqueId, number, pointer],
            "ncclCommGetAsyncError": [pointer, pointer],
            "ncclCommAbort": [pointer],
            "ncclBroadcast": [pointer, pointer, count, number, number, pointer, pointer],
            "ncclSend": [pointer, count, number, number, pointer, pointer],
            "ncclRecv": [pointer, count, number, number, pointer, pointer],
            "ncclAllReduce": [pointer, pointer, count, number, number, pointer, pointer],
        }.items():
            function = getattr(self._c, name)
            function.argtypes, function.restype = arguments, ctypes.c_int
        self._c.ncclGetErrorString.argtypes, self._c.ncclGetErrorString.restype = [number], ctypes.c_char_p
        self._c.ncclGetLastError.argtypes, self._c.ncclGetLastError.restype = [pointer], ctypes.c_char_p


def loaded() -> str | None:
    """The libnccl that this process has already, whoever loaded it."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = (line.split(maxsplit=5)[5] for line in lines if "libnccl.so" in line)
    return next(iter(paths), None)


def find(configured: str = "") -> str:
    """The library to use: the one that is loaded, else the configured one, else the wheel's, else the system's."""
    here = loaded()
    if here is not None:
        return here
    if configured:
        return configured
    inherited = os.environ.get(VARIABLE)
    if inherited:
        return inherited
    try:
        wheel = importlib.util.find_spec("nvidia.nccl")
    except ModuleNotFoundError:
        wheel = None
    for folder in (wheel.submodule_search_locations or ()) if wheel is not None else ():
        path = Path(folder) / "lib" / SONAME
        if path.is_file():
            return str(path)
    return SONAME


@cache
def open_library(path: str) -> Library:
    """The library at `path`, opened once."""
    return Library(path)


def preload(configured: str, interface: str) -> Library:
    """Load the run's libnccl, before torch loads its own; the processes that this one starts shall do so too.

    `interface` is where NCCL's sockets meet, unless the environment says so already: NCCL reads that once. NcclError
    if there is no library, or another one was faster.
    """
    path = find(configured)
    if configured and os.path.realpath(path) != os.path.realpath(configured):
        raise NcclError(
            f"expected NCCL's library {configured} (weights.nccl_library), but this process has loaded {path}: load "
            "it before torch"
        )
    os.environ.setdefault(INTERFACE_VARIABLE, exactly(interface))
    library = open_library(path)
    os.environ[VARIABLE] = loaded() or path
    return library


def preload_inherited() -> None:
    """In a process that a service has started: load what the service has loaded, if it has."""
    path = os.environ.get(VARIABLE)
    if path:
        open_library(path)


def preload_in_engines(environment: MutableMapping[str, str]) -> None:
    """For processes that an engine starts in its own ways: the loader loads it, and vLLM's own binding opens it."""
    path = environment.get(VARIABLE)
    if path:
        others = environment.get("LD_PRELOAD", "").split(":")
        environment["LD_PRELOAD"] = ":".join([path, *(other for other in others if other not in ("", path))])
        environment.setdefault("VLLM_NCCL_SO_PATH", path)


def without_preload(environment: Mapping[str, str]) -> dict[str, str]:
    """For processes that shall not have it: it takes 350 MB of what a limit on addresses leaves them."""
    left = dict(environment)
    path = left.pop(VARIABLE, None)
    if path is not None and "LD_PRELOAD" in left:
        left["LD_PRELOAD"] = ":".join(other for other in left["LD_PRELOAD"].split(":") if other != path)
    return left


def exactly(interface: str) -> str:
    """How NCCL is told one interface: without the sign, "eth1" would mean eth10 too."""
    return f"={interface}"
