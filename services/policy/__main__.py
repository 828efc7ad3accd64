"""`python -m services.policy`: one policy process of a run, or with `--replay` one recorded step alone."""

from __future__ import annotations

import sys

from shared.service import ServiceArguments, run_service


def main(arguments: ServiceArguments) -> int:
    """Load torch only now: a bad recipe is refused, and a launcher that died is noticed, before those seconds."""
    from services.policy.process import main as run

    return run(arguments)


if __name__ == "__main__":
    if "--replay" in sys.argv[1:]:
        from services.policy.replay import main as replay

        sys.exit(replay(sys.argv[1:]))
    run_service("policy", main)
