"""`python -m services.evaluator`: one evaluator process of a run."""

from __future__ import annotations

from shared.service import ServiceArguments, run_service


def main(arguments: ServiceArguments) -> int:
    """Load torch only now: a bad recipe is refused, and a launcher that died is noticed, before those seconds."""
    from services.evaluator.process import main as run

    return run(arguments)


if __name__ == "__main__":
    run_service("evaluator", main)
