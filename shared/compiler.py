"""What torch.compile needs of a machine without a GPU, to build its code while it runs."""

from __future__ import annotations

import os
import shlex
import shutil
import sysconfig
from pathlib import Path


def lacking() -> str | None:
    """What was expected, what is here, and what to do; None where nothing lacks."""
    compiler = shlex.split(os.environ.get("CXX") or "g++")[0]
    if shutil.which(compiler) is None:
        return f"a C++ compiler, got no {compiler!r} in PATH; install one (g++), name it in CXX"
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").is_file():
        return f"the headers of Python, got no Python.h in {headers}; install them (python3-dev)"
    return None
