"""docs/metrics.md names every figure of a metrics line, and none that is not there."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from transformers import Qwen3Config

from services.controller.liveness import KINDS, Liveness
from services.policy.correction import CorrectionSettings
from services.policy.losses import GrpoSettings, grpo_loss
from services.policy.speed import MEMORY, of_the_machine, rates, work_of
from tests.unit.controller.world import small_world

DOCUMENT = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text(encoding="utf-8")
NAMED = {
    name for row in re.findall(r"^\| (`[^|]+`) \|", DOCUMENT, re.MULTILINE) for name in re.findall(r"`([^`]+)`", row)
}
FAMILIES = {"reward/PART": r"reward/.+", "discarded/CAUSE": r"discarded/.+", "time/ROLE/KIND": r"time/\w+/\w+"}
FROM_THE_POLICY = {"loss", "kl_old", "kl_reference", "entropy", "clip_share", "grad_norm", "train_seconds"} | {
    "mismatch_abs", "mismatch_kl", "mismatch_max", "importance_mean", "importance_cut", "mismatch_outside"
}  # fmt: skip
OF_THE_MACHINE = {"machine/tokens_per_s", "machine/mfu", "machine/peak_memory_bytes"}
FROM_THE_SHELL = {"controller_lag"}
PLACES = {"RUN/metrics.jsonl", "RUN/tensorboard"}


def family(name: str) -> str:
    return next((title for title, pattern in FAMILIES.items() if re.fullmatch(pattern, name)), name)


def core_names() -> set[str]:
    """Keys of a training step's line as the core makes it, without what its policy reports."""
    world = small_world()
    world.deliver()
    assert world.metrics
    lines = [line for line in world.metrics if line["stage"] == "train"]
    return {family(name) for line in lines for name in line}


def test_every_figure_of_a_line_is_in_the_document_and_the_other_way_round() -> None:
    liveness = Liveness(10.0)
    liveness.note(("rollout-0", 1, 0), "generating", 1, {"generating": 1.0})
    made = (
        core_names()
        | FROM_THE_POLICY
        | OF_THE_MACHINE
        | FROM_THE_SHELL
        | {family(name) for name in liveness.take_spent()}
    )
    assert made | {"discarded/CAUSE", "reward/PART", "set/FIELD", "mismatch_abs/ENGINE"} == NAMED - PLACES


def test_the_policys_loss_reports_what_the_document_says() -> None:
    tokens = torch.zeros(3)
    settings = GrpoSettings(0.2, 0.2, 0.1, CorrectionSettings("truncate", "token", 0.5, 2.0))
    result = grpo_loss(tokens, tokens, tokens, tokens, tokens, tokens, tokens, torch.tensor([3]), settings, tokens=3)
    assert {*result.sums, *result.maxima} | {"grad_norm", "train_seconds"} == FROM_THE_POLICY


def test_the_machines_figures_are_those_that_the_document_says() -> None:
    work = work_of([], Qwen3Config(), 3, 1, peak=1e12)
    assert {*rates(work, 1.0), MEMORY} == OF_THE_MACHINE == set(filter(of_the_machine, OF_THE_MACHINE))


def test_every_kind_of_work_is_in_the_document() -> None:
    row = next(text for text in DOCUMENT.splitlines() if text.startswith("| `time/ROLE/KIND`"))
    assert {*KINDS.values(), "other"} <= set(re.findall(r"`(\w+)`", row))
