"""`python -m services.policy`: one policy process of a run, or with `--replay` one recorded step alone."""

from __future__ import annotations

import sys

from shared.service import run_service

if __name__ == "__main__":
    if "--replay" in sys.argv[1:]:
        from services.policy.replay import main as replay

        sys.exit(replay(sys.argv[1:]))
    from services.policy.service import main

    run_service("policy", main)
