"""TRL's GRPOTrainer on the same task. Runs in an environment that has `trl` (`make bench-trl` makes one).

`python -m benchmarks.rl.trl_loop RECIPE --batches N --threads T --out FOLDER`, as `by_hand`. Its settings are those of
the recipe; where TRL's defaults would only cost time here (gradient checkpointing of a model of a million parameters,
logging, saving) they are off.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.rl.task import Task, process_began, run_loop
from shared.data.answers import extract_answer
from shared.models import load_model


class Ends(TrainerCallback):
    """Notes when each optimizer step was done."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Called by the trainer."""
        self.ends.append(time.time())


def train(task: Task, batches: int, out: Path) -> dict[str, object]:
    """Train for `batches` batches; save to `out`."""
    table, rollout = task.train, task.recipe.rollout
    model = load_model(task.recipe.model, task.recipe.run.seed, weights=True)
    rows = [task.row(counter) for counter in range(batches * table.batch_size)]
    prompts = Dataset.from_list([{"prompt": task.dataset.row(row).messages, "row": row} for row in rows])
    means: list[float] = []
    tokens = 0

    def verifier(completions: list[Any], row: list[int], completion_ids: list[list[int]], **_: Any) -> list[float]:
        nonlocal tokens
        tokens += sum(map(len, completion_ids))
        texts = [completion[0]["content"] for completion in completions]
        scores = [task.dataset.score(index, extract_answer(text)) for index, text in zip(row, texts, strict=True)]
        means.append(sum(scores) / len(scores))
        return scores

    samples = table.batch_size * table.samples
    ends = Ends()
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=verifier,
        args=GRPOConfig(
            output_dir=str(out / "trainer"),
            use_cpu=True,
            bf16=False,
            max_steps=batches,
            per_device_train_batch_size=samples,
            gradient_accumulation_steps=1,
            num_generations=table.samples,
            max_completion_length=rollout.max_new_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            learning_rate=table.lr,
            lr_scheduler_type="constant",
            adam_beta1=table.beta1,
            adam_beta2=table.beta2,
            weight_decay=table.weight_decay,
            max_grad_norm=table.grad_clip,
            epsilon=table.clip_low,
            epsilon_high=table.clip_high,
            beta=table.kl_weight,
            loss_type="dapo",
            scale_rewards="group",
            gradient_checkpointing=False,
            shuffle_dataset=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=task.recipe.run.seed,
        ),
        train_dataset=prompts,
        processing_class=task.tokenizer,
        callbacks=[ends],
    )
    trainer.train()
    model.save_pretrained(out)
    task.tokenizer.save_pretrained(out)
    return {
        "way": "TRL",
        "samples_per_batch": samples,
        "ends": ends.ends,
        "whole_s": ends.ends[-1] - process_began(),
        "tokens": tokens,
        "rewards": means,
    }


if __name__ == "__main__":
    run_loop(train, "GRPO by TRL's trainer.")
