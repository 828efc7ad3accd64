"""The control plane must work where neither torch nor numpy is installed."""

from __future__ import annotations

import subprocess
import sys


def test_the_bus_imports_without_torch_and_numpy():
    program = (
        "import sys; sys.modules['torch'] = sys.modules['numpy'] = None; "
        "import shared.bus, shared.bus.channel, shared.messages; print('ok')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "ok", done.stderr
