"""libnccl, the real one, on a machine that need not have a GPU: which one is taken, its ids, its words."""

from __future__ import annotations

import ctypes.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shared.gpus import first_gpu
from shared.nccl import library as module
from shared.nccl.communicator import Communicator
from shared.nccl.library import Library, NcclError, exactly, find, preload_in_engines, without_preload

ROOT = Path(__file__).resolve().parents[3]


def test_it_tells_its_version(library: Library) -> None:
    assert re.fullmatch(r"2\.\d+\.\d+", library.version)


def test_every_id_is_another_one_and_names_an_address(library: Library) -> None:
    first, second = library.unique_id(), library.unique_id()
    assert first != second
    assert {len(first), len(second)} == {module.ID_BYTES}
    assert int.from_bytes(first[8:10], sys.byteorder) in (2, 10), "AF_INET or AF_INET6"


@pytest.mark.skipif(first_gpu() is not None, reason="with a GPU it forms")
def test_without_a_gpu_a_communicator_is_refused_at_once_in_nccls_own_words(library: Library) -> None:
    with pytest.raises(NcclError, match=r"could not be begun: unhandled cuda error .*\(Cuda failure.*driver"):
        Communicator(library, 2, library.unique_id(), 0, timeout_s=60.0)


def test_a_path_that_is_no_library_is_refused_with_what_to_do(tmp_path: Path) -> None:
    text = tmp_path / "libnccl.so.2"
    text.write_text("not a library")
    for path in (str(text), str(tmp_path / "absent.so")):
        with pytest.raises(NcclError, match=r"expected NCCL's library at .*set weights\.nccl_library"):
            Library(path)


def test_a_library_without_nccls_functions_is_refused() -> None:
    libc = ctypes.util.find_library("c")
    assert libc is not None
    with pytest.raises(NcclError, match="ncclGetVersion"):
        Library(libc)


def test_what_is_loaded_goes_before_what_is_configured_and_that_before_what_was_inherited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(module.VARIABLE, "/inherited/libnccl.so.2")
    monkeypatch.setattr(module, "loaded", lambda: None)
    assert find("/configured/libnccl.so.2") == "/configured/libnccl.so.2"
    assert find() == "/inherited/libnccl.so.2"
    monkeypatch.setattr(module, "loaded", lambda: "/loaded/libnccl.so.2")
    assert find("/configured/libnccl.so.2") == "/loaded/libnccl.so.2"


def test_a_configured_library_that_came_too_late_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "loaded", lambda: "/torchs/libnccl.so.2")
    with pytest.raises(NcclError, match=r"has loaded /torchs/libnccl\.so\.2: load it before torch"):
        module.preload("/configured/libnccl.so.2", "lo")


def test_an_engines_processes_load_it_first_and_reward_workers_do_not() -> None:
    environment = {module.VARIABLE: "/n/libnccl.so.2", "LD_PRELOAD": "/usr/lib/libjemalloc.so"}
    preload_in_engines(environment)
    preload_in_engines(environment)
    assert environment["LD_PRELOAD"] == "/n/libnccl.so.2:/usr/lib/libjemalloc.so"
    assert environment["VLLM_NCCL_SO_PATH"] == "/n/libnccl.so.2"
    assert without_preload(environment)["LD_PRELOAD"] == "/usr/lib/libjemalloc.so"
    untouched = {"LD_PRELOAD": "/usr/lib/libjemalloc.so"}
    preload_in_engines(untouched)
    assert untouched == {"LD_PRELOAD": "/usr/lib/libjemalloc.so"}


USE = """
import ctypes, sys
sys.path.insert(0, sys.argv[1])
if sys.argv[3] == "preload":
    from shared.nccl.library import preload
    preload("", "lo")
print(ctypes.CDLL(sys.argv[2]).version_that_it_meets())
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="wants gcc, to make what stands for torch's library")
def test_what_links_another_libnccl_meets_the_one_that_was_preloaded(library: Library, tmp_path: Path) -> None:
    """As libtorch_cuda does, by SONAME and with a search path of its own."""
    (tmp_path / "other.c").write_text("int ncclGetVersion(int* v) { *v = 11111; return 0; }")
    (tmp_path / "user.c").write_text(
        "int ncclGetVersion(int*); int version_that_it_meets(void) { int v; ncclGetVersion(&v); return v; }"
    )
    other, user = tmp_path / module.SONAME, tmp_path / "libuser.so"
    shared = ["gcc", "-shared", "-fPIC"]
    subprocess.run([*shared, f"-Wl,-soname,{module.SONAME}", "-o", other, tmp_path / "other.c"], check=True)
    subprocess.run([*shared, "-o", user, tmp_path / "user.c", other, f"-Wl,-rpath,{tmp_path}"], check=True)

    def met(how: str) -> str:
        command = [sys.executable, "-c", USE, str(ROOT), str(user), how]
        environment = os.environ | {module.VARIABLE: library.path}
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()

    assert met("not") == "11111"
    major, minor, patch = map(int, library.version.split("."))
    assert met("preload") == str(10000 * major + 100 * minor + patch)


def test_nccl_is_told_the_interface_exactly() -> None:
    assert exactly("eth1") == "=eth1"
