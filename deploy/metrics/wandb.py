"""Weights & Biases: one W&B run a run of ours, under its id; `mode = "offline"` writes to RUN/wandb alone.

W&B counts a step of its own, which may not go back; ours may (a new lineage), so theirs is the number of the line.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from deploy.readers.figures import Line, Verdict, figures
from shared.config.schema import WandbTable


class WandbWriter:
    """Sends figures through the `wandb` package; what an earlier supervisor sent is left out."""

    def __init__(self, run_folder: Path, table: WandbTable, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ModuleNotFoundError as error:
            missing = error.name or "wandb"
            raise RuntimeError(f"[metrics.wandb] needs {missing}: pip install 'orrery[wandb]'") from None
        self._sent_path = run_folder / "wandb" / "sent"
        self._sent_path.parent.mkdir(parents=True, exist_ok=True)
        self._sent = int(self._sent_path.read_text()) if self._sent_path.exists() else 0
        self._run = wandb.init(
            project=table.project,
            entity=table.entity,
            mode=table.mode,
            id=re.sub(r"[^A-Za-z0-9_.-]", "-", run_folder.name),
            name=run_folder.name,
            resume="allow",
            dir=str(run_folder),
            config=config,
            settings=wandb.Settings(console="off", silent=True, init_timeout=60),
        )
        self._run.define_metric("*", step_metric="step")

    def line(self, number: int, line: Line) -> None:
        if number >= self._sent:
            self._run.log({**figures(line), "step": line["step"]}, step=number)
            self._sent = number + 1
            self._sent_path.write_text(f"{self._sent}\n")

    def verdict(self, number: int, verdict: Verdict) -> None:
        # the same value of the same verdict may be told twice: a summary holds the newest, a chart one point a step
        self._run.log({**verdict.values, "step": verdict.step}, step=max(number, self._sent))

    def close(self) -> None:
        self._run.finish()
