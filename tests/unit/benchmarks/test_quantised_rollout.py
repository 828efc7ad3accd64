"""The benchmark of narrow rollouts: a recipe cut in two, and its table."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from benchmarks.quantised_rollout import ARMS, ArmResult, as_markdown, write_stages
from shared.config import load_recipe


def test_a_recipe_is_cut_into_its_stages_and_rl_begins_from_what_sft_leaves(tmp_path: Path) -> None:
    whole = load_recipe("recipes/quickstart.toml")
    (tmp_path / "sft" / "export").mkdir(parents=True)
    sft, rl = (load_recipe(path) for path in write_stages(Path("recipes/quickstart.toml"), 7, 50, tmp_path))
    assert sft.train is None and sft.sft == whole.sft and sft.model == whole.model
    assert rl.sft is None and rl.train == whole.train and rl.rollout == whole.rollout
    assert rl.model.path == str(tmp_path / "sft" / "export")
    for stage in (sft, rl):
        assert stage.run.seed == 7
        assert stage.evaluation is not None and stage.evaluation.suites["heldout"].problems == 50


def test_the_table_has_a_line_an_arm_with_means_over_its_seeds() -> None:
    def ran(seed: int, arm: str, exported: float, clean: bool = True) -> dict[str, object]:
        return asdict(ArmResult(seed, arm, 500, 0.4, 0.5, exported, 0.01 * seed, 0.001, 0.02, 0.01, 0.6, clean))

    plain, narrow, *_ = ARMS
    runs = [ran(2, plain, 0.8), ran(1, plain, 0.7), ran(1, narrow, 0.6), ran(2, narrow, 0.5, clean=False)]
    table = as_markdown({"machine": "m", "load_average": 1.0, "recipe": "r.toml", "overrides": [], "runs": runs})
    lines = table.splitlines()
    assert any(line.startswith(f"| {plain} | 70.0, 80.0 | **75.0 %** | 50.0 % | 0.0150 ") for line in lines)
    assert any(line.startswith(f"| {narrow} | 60.0, 50.0 | **55.0 %** ") and "NOT CLEAN" in line for line in lines)
    assert sum("clean" in line.lower() for line in lines if line.startswith("| ")) == 2
