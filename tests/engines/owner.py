"""A process that starts an engine and waits to be killed: `python -m tests.engines.owner ENGINE FOLDER`."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from tests.engines.conftest import start
from tests.engines.families import SLOTS, tiny

if __name__ == "__main__":
    engine = start(sys.argv[1], tiny("qwen3"), Path(sys.argv[2]), SLOTS, {})
    print("started", flush=True)
    signal.pause()
