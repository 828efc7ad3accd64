"""What all tests share."""

from __future__ import annotations

import os

# two threads of every library on a small machine only wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")
