"""A synchronous GRPO loop in one process, as one writes it by hand with torch and Hugging Face `generate`.

`python -m benchmarks.rl.by_hand RECIPE --batches N --threads T --out FOLDER` trains and saves to FOLDER, beside which
`outcome.json` says how it went. Generation and training take turns with all of the machine's cores; there is nothing
to schedule, to transfer, or to survive.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.rl.task import Task, process_began, run_loop
from shared.models import load_model

EPSILON = 1e-6


def generate(model: torch.nn.Module, task: Task, rows: list[int]) -> tuple[Tensor, Tensor, list[list[int]]]:
    """Samples for the rows' prompts: (sequences [B, S] with prompts padded left, their mask, completions)."""
    prompts = [task.prompt(row) for row in rows]
    width = max(map(len, prompts))
    pad = task.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    with torch.inference_mode():
        sequences = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=task.recipe.rollout.temperature,
            top_k=0,
            top_p=1.0,
            num_return_sequences=task.train.samples,
            max_new_tokens=task.recipe.rollout.max_new_tokens,
            pad_token_id=pad,
            eos_token_id=task.tokenizer.eos_token_id,
        )
    sequences = sequences.clone()
    made = sequences[:, width:]
    ended = (made == task.tokenizer.eos_token_id).long().cumsum(1)
    kept = (ended == 0) | ((ended == 1) & (made == task.tokenizer.eos_token_id))
    full = torch.cat([mask.repeat_interleave(task.train.samples, 0), kept.long()], dim=1)
    completions = [row[keep].tolist() for row, keep in zip(made, kept, strict=True)]
    return sequences, full, completions


def loss_of(model: torch.nn.Module, sequences: Tensor, mask: Tensor, width: int, advantages: Tensor) -> Tensor:
    """GRPO's loss on samples that the current weights drew: the ratio is 1 and only its gradient counts."""
    new = sequences.shape[1] - width
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(
        input_ids=sequences, attention_mask=mask, position_ids=positions, logits_to_keep=new + 1, use_cache=False
    ).logits[:, :-1]
    logprobs = logits.float().log_softmax(-1).gather(-1, sequences[:, width:, None]).squeeze(-1)
    ratio = torch.exp(logprobs - logprobs.detach())
    kept = mask[:, width:].float()
    return -(ratio * advantages[:, None] * kept).sum() / kept.sum()


def train(task: Task, batches: int, out: Path) -> dict[str, object]:
    """Train for `batches` batches; save to `out`."""
    model = load_model(task.recipe.model, task.recipe.run.seed, weights=True)
    table = task.train
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=table.lr, betas=(table.beta1, table.beta2), weight_decay=table.weight_decay
    )
    torch.manual_seed(task.recipe.run.seed)
    ends, rewards_seen, tokens = [], [], 0
    for batch in range(batches):
        rows = [task.row(batch * table.batch_size + index) for index in range(table.batch_size)]
        sequences, mask, completions = generate(model, task, rows)
        owners = [row for row in rows for _ in range(table.samples)]
        rewards = torch.tensor([task.reward(row, made) for row, made in zip(owners, completions, strict=True)])
        groups = rewards.view(-1, table.samples)
        centred = groups - groups.mean(1, keepdim=True)
        advantages = (centred / (groups.std(1, correction=0, keepdim=True) + EPSILON)).flatten()
        width = sequences.shape[1] - max(map(len, completions))
        optimizer.zero_grad(set_to_none=True)
        loss_of(model, sequences, mask, width, advantages).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), table.grad_clip)
        optimizer.step()
        ends.append(time.time())
        rewards_seen.append(float(rewards.mean()))
        tokens += sum(map(len, completions))
    model.save_pretrained(out)
    task.tokenizer.save_pretrained(out)
    return {
        "way": "by hand",
        "samples_per_batch": table.batch_size * table.samples,
        "ends": ends,
        "whole_s": ends[-1] - process_began(),
        "tokens": tokens,
        "rewards": rewards_seen,
    }


if __name__ == "__main__":
    run_loop(train, "GRPO by hand: Hugging Face generate, one process.")
