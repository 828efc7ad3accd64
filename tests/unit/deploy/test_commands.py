"""Commands that look: samples, config, doctor, mesh; what they print, and how they end."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from deploy.checks import machine
from deploy.checks.schema import rows
from deploy.cli import console
from deploy.cli.app import app
from shared.config.lines import key_lines, line_of
from tests.unit.deploy.runs import make_run, write_group

ROOT = Path(__file__).parents[3]
Orrery = Callable[..., Result]


@pytest.fixture
def orrery(monkeypatch: pytest.MonkeyPatch) -> Orrery:
    """Runs a command; `output` is what it printed."""
    from rich.console import Console

    def run(*words: str) -> Result:
        def fresh() -> Console:
            return Console(width=200, color_system=None, highlight=False, soft_wrap=True)

        monkeypatch.setattr(console, "out", fresh())
        monkeypatch.setattr(console, "err", fresh())
        return CliRunner().invoke(app, list(words))

    return run


def test_the_newest_samples_are_shown_with_their_rewards(tmp_path: Path, orrery: Orrery) -> None:
    shown = orrery("samples", str(make_run(tmp_path / "run")), "-n", "2")
    assert shown.exit_code == 0
    assert [text.split()[1] for text in shown.output.splitlines() if text.startswith("reward")] == ["0.5", "0.8"]
    assert "exact 0.8" in shown.output and "row 8 of sums" in shown.output and "answer 8.3" in shown.output


def test_samples_show_the_question_and_its_reference_and_raw_the_whole_prompt(tmp_path: Path, orrery: Orrery) -> None:
    run = str(make_run(tmp_path / "run"))
    shown, raw = orrery("samples", run, "-n", "1").output, orrery("samples", run, "-n", "1", "--raw").output
    assert "8+1" in shown and "reference: 9" in shown
    assert "<ask>" not in shown and "<ask>8+1" in raw


@pytest.mark.parametrize(("option", "rewards"), [("--best", ["1", "1", "1"]), ("--worst", ["0", "0", "0"])])
def test_best_and_worst_are_sorted_by_reward(tmp_path: Path, orrery: Orrery, option: str, rewards: list[str]) -> None:
    shown = orrery("samples", str(make_run(tmp_path / "run")), option, "-n", "3")
    assert [text.split()[1] for text in shown.output.splitlines() if text.startswith("reward")] == rewards


def test_held_out_answers_are_shown_apart(tmp_path: Path, orrery: Orrery) -> None:
    run = make_run(tmp_path / "run")
    write_group(run, 77, [1.0], purpose="eval")
    assert "answer 77.0" in orrery("samples", str(run), "--held-out").output
    assert "answer 77.0" not in orrery("samples", str(run), "-n", "100").output


def test_samples_that_are_not_there_are_said_not_to_be(tmp_path: Path, orrery: Orrery) -> None:
    run = make_run(tmp_path / "run")
    shown = orrery("samples", str(run), "--step", "3")
    assert shown.exit_code == 1 and "step 3 was not committed in run" in shown.output
    (run / "samples" / "rollout-0.jsonl").unlink()
    assert "no such samples" in orrery("samples", str(run)).output


def recipe_file(folder: Path, text: str) -> str:
    path = folder / "recipe.toml"
    path.write_text(text)
    return str(path)


GOOD = """[model.build]
layers = 1

[data.sums]
kind = "jsonl"
path = "{rows}"

[sft]
dataset = "sums"
batches = 3
batch_size = 2
lr = 1e-3
"""


def test_every_fault_of_a_recipe_is_told_at_once_with_its_line(tmp_path: Path) -> None:
    text = GOOD.format(rows="x").replace("layers", "layrs").replace("batches = 3", 'batches = "three"')
    command = [sys.executable, "-m", "deploy.cli", "config", "check", recipe_file(tmp_path, text)]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode == 2
    assert "line 2: model.build.layrs: unknown key; did you mean model.build.layers?" in told.stderr
    assert "line 10: sft.batches" in told.stderr
    assert "Traceback" not in told.stderr


def test_a_good_recipe_is_told_what_it_would_run(tmp_path: Path, orrery: Orrery) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1+1", "answer": "2", "response": "2"}\n')
    path = recipe_file(tmp_path, GOOD.format(rows=rows))
    shown = orrery("config", "check", path, "--set", "sft.batches=7")
    assert shown.exit_code == 0, shown.output
    assert "data.sums: 1 rows" in shown.output and "model qwen3" in shown.output
    assert "sft: 7 batches of 2 prompts from sums" in shown.output


def test_faults_of_data_and_model_are_told_together(tmp_path: Path, orrery: Orrery) -> None:
    text = GOOD.format(rows=tmp_path / "none.jsonl").replace(
        "[model.build]\nlayers = 1", f'[model]\npath = "{tmp_path}"'
    )
    shown = orrery("config", "check", recipe_file(tmp_path, text))
    assert shown.exit_code == 2
    assert shown.output.count("error") == 2 and "none.jsonl" in shown.output and "config.json" in shown.output
    assert orrery("config", "check", recipe_file(tmp_path, text), "--recipe-only").exit_code == 0


def test_worked_answers_that_are_missing_are_found_before_the_run(tmp_path: Path, orrery: Orrery) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1+1", "answer": "2"}\n')
    shown = orrery("config", "check", recipe_file(tmp_path, GOOD.format(rows=rows)))
    assert shown.exit_code == 2 and "[sft] learns worked answers, but row 0 has none" in shown.output


def test_lines_of_keys_are_found_in_tables_arrays_and_dotted_keys() -> None:
    text = '# one\n[a.b]\nc = 1\n"d e".f = 2\n[[a.parts]]\nkind = "x"\n[[a.parts]]\nkind = "y"\n'
    lines = key_lines(text)
    assert lines[("a", "b", "c")] == 3
    assert lines[("a", "b", "d e", "f")] == 4
    assert (lines[("a", "parts", 0, "kind")], lines[("a", "parts", 1, "kind")]) == (6, 8)
    assert line_of(lines, ("a", "b", "missing")) == 2
    assert line_of(lines, ("nothing",)) is None


def test_the_schema_is_json_and_a_table_with_every_key(orrery: Orrery) -> None:
    assert "RunTable" in json.loads(orrery("config", "schema").output)["$defs"]
    found = {row.key: row for row in rows()}
    assert found["train.lr"].kind == "float > 0 <= 1" and found["train.lr"].default == "required"
    assert found["train.lr"].live and not found["train.mu"].live
    assert found["train.samples"].default == "8" and found["rollout.slots"].meaning
    assert found["[data.NAME]"].is_table and found["data.NAME.kind"].kind.startswith('"reasoning_gym" | ')
    assert {"[evaluation]", "[metrics.wandb]", "[timeouts]", "[model.build]"} <= found.keys()
    table = orrery("config", "schema", "--table").output
    assert "max_staleness" in table and "trained version - sampled version" in table


def test_a_layout_that_the_model_cannot_have_is_found_before_a_run(orrery: Orrery) -> None:
    recipe = str(ROOT / "recipes" / "quickstart.toml")
    shown = orrery("config", "check", recipe, "--set", "policy.parallel.tp=4")
    assert shown.exit_code == 2 and "got tp = 4; choose a common divisor" in " ".join(shown.output.split())
    shown = orrery("config", "check", recipe, "--set", "policy.parallel.tp=2")
    assert shown.exit_code == 0 and "1 policy of 2 ranks" in shown.output


def test_the_doctor_names_what_is_missing_and_how_to_get_it(orrery: Orrery, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = orrery("doctor")
    assert shown.exit_code == 0 and "runs can work here" in shown.output and "torch" in shown.output
    known = machine._version
    monkeypatch.setattr(machine, "_version", lambda name: None if name in ("torch", "wandb") else known(name))
    shown = orrery("doctor")
    assert shown.exit_code == 1
    assert "until this is mended: torch" in shown.output and "pip install 'orrery[wandb]'" in shown.output


def test_the_doctor_tells_which_nccl_there_is_or_how_to_get_one(
    orrery: Orrery, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Loaded:
        version, path = "2.32.3", "/there/libnccl.so.2"

    monkeypatch.setattr(machine, "open_library", lambda path: Loaded)
    assert "2.32.3 at /there/libnccl.so.2" in orrery("doctor").output
    monkeypatch.undo()
    monkeypatch.setattr(machine, "find", lambda: str(tmp_path / "absent.so"))
    shown = orrery("doctor")
    assert shown.exit_code == 0, "runs work without"
    assert "weights.nccl_library" in shown.output and "absent.so" in shown.output


def test_meshes_of_a_run_without_a_controller_cannot_be_listed(tmp_path: Path, orrery: Orrery) -> None:
    shown = orrery("mesh", "ls", str(make_run(tmp_path / "run")))
    assert shown.exit_code == 1 and "no controller that answers" in shown.output


def test_watching_a_run_that_is_over_says_what_to_do(tmp_path: Path, orrery: Orrery) -> None:
    shown = orrery("status", str(make_run(tmp_path / "run")), "--watch")
    assert shown.exit_code == 0 and "'orrery report run'" in shown.output


def test_help_loads_nothing_that_takes_long() -> None:
    code = "import sys; import deploy.cli.app; print(*sorted(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    heavy = {"pydantic", "zmq", "torch", "numpy", "matplotlib", "structlog", "msgspec", "asyncio"}
    assert not heavy & set(loaded.stdout.split())


def test_a_verdict_that_could_not_be_written_is_not_begun(tmp_path: Path, orrery: Orrery) -> None:
    (tmp_path / "file").write_text("no folder")
    shown = orrery("eval", "no-such-model", "--suite", "task:chain_sum", "--out", str(tmp_path / "file" / "verdict"))
    assert shown.exit_code == 2
    assert "--out" in shown.output and "give another path" in shown.output
    out = tmp_path / "new" / "verdict.json"
    assert "expected a suite" in orrery("eval", "no-such-model", "--out", str(out)).output
    assert out.parent.is_dir() and not out.exists()
