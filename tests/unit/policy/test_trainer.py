"""The trainer's gradients and its state machine, on tiny real models of every family."""

from __future__ import annotations

import math
from itertools import filterfalse
from typing import Any

import msgspec
import pytest
import torch
from msgspec import structs

from services.policy.batch import Row, rows_of, sequences_of
from services.policy.packing import pack
from services.policy.speed import of_the_machine
from services.policy.trainer import Trainer, TrainerError
from shared.messages import CommitStep, GradientsReady, Position, StepApplied, TrainStep

FAMILIES = ("qwen3", "qwen2", "llama", "qwen3_moe")


def commit(step: TrainStep) -> CommitStep:
    return CommitStep(step.step, step.attempt, step.position.lineage)


def close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    assert left.keys() == right.keys() and left
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], atol=tolerance, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", ["sft", "train"])
def test_micro_batches_add_up_to_the_gradient_of_the_whole_batch(tools: Any, family: str, stage: str) -> None:
    found = []
    for limit in (100_000, 40, 1):
        trainer = tools.trainer(tools.recipe(family, policy__micro_batch_tokens=limit))
        vote = trainer.compute(*tools.step(trainer.recipe, stage=stage, hyperparameters={f"{stage}.grad_clip": 1e9}))
        assert vote.finite
        found.append((tools.gradients(trainer), vote.metrics))
    for gradients, metrics in found[1:]:
        close(gradients, found[0][0])
        for name in filterfalse(of_the_machine, found[0][1]):
            assert metrics[name] == pytest.approx(found[0][1][name], abs=1e-5), name


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_sum_mean", "sequence_mean_mean", "constant"])
def test_the_shares_of_members_add_up_to_the_gradient_of_the_whole_step(tools: Any, reduction: str) -> None:
    recipe = tools.recipe(train__reduction=reduction)
    free = {"train.grad_clip": 1e9}
    parts = []
    for share in (slice(None), slice(0, 1), slice(1, 3)):
        trainer = tools.trainer(recipe)
        trainer.compute(*tools.step(recipe, keep=share, hyperparameters=free))
        parts.append(tools.gradients(trainer))
    close({name: parts[1][name] + parts[2][name] for name in parts[1]}, parts[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_equals_that_of_a_plain_forward_pass_over_each_sequence(tools: Any, family: str) -> None:
    recipe = tools.recipe(family)
    trainer = tools.trainer(recipe)
    step, frames = tools.step(recipe, stage="sft", hyperparameters={"sft.grad_clip": 1e9})
    vote = trainer.compute(step, frames)
    mine = tools.gradients(trainer)
    trainer.model.zero_grad()
    loss = torch.zeros(())
    for s in sequences_of(step, frames):
        ids = torch.tensor([[*s.prompt.tolist(), *s.tokens.tolist()]])
        labels = ids.clone()
        labels[0, : len(s.prompt)] = -100
        logits = trainer.model(input_ids=ids, use_cache=False).logits[0, :-1]
        loss = loss + torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum")
    loss = loss / step.tokens
    loss.backward()
    assert vote.metrics["loss"] == pytest.approx(loss.item(), abs=1e-5)
    plain = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in trainer.model.named_parameters()}
    close(mine, plain)


@pytest.mark.parametrize("limit", [1000, 30, 1], ids=["whole groups", "split groups", "one response a row"])
@pytest.mark.parametrize("family", FAMILIES)
def test_responses_that_share_a_prompt_have_the_log_probs_and_gradients_of_separate_rows(
    tools: Any, family: str, limit: int
) -> None:
    recipe = tools.recipe(family)
    trainer = tools.trainer(recipe)
    step, frames = tools.step(recipe, groups=3, samples=5, temperature=0.7)
    rows = rows_of(sequences_of(step, frames), limit, 128)
    assert len({len(row.prompt) for row in rows}) > 1
    shared, separate = [], []
    for row in rows:
        shared.append(trainer.layout.decoder(pack([row]))[0])
    coefficients = torch.linspace(-1.0, 1.0, step.tokens)
    (torch.cat(shared) * coefficients).sum().backward()
    gradients = tools.gradients(trainer)
    trainer.model.zero_grad()
    for s in (s for row in rows for s in row.responses):
        ids = torch.tensor([[*s.prompt.tolist(), *s.tokens.tolist()]])
        logits = trainer.model(input_ids=ids, use_cache=False).logits[0, len(s.prompt) - 1 : -1] / 0.7
        separate.append(logits.log_softmax(-1).gather(-1, ids[0, len(s.prompt) :, None]).squeeze(-1))
    torch.testing.assert_close(torch.cat(shared), torch.cat(separate), atol=1e-5, rtol=0)
    (torch.cat(separate) * coefficients).sum().backward()
    close(gradients, tools.gradients(trainer), 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_sft_on_one_batch_lowers_its_loss(tools: Any, family: str) -> None:
    recipe = tools.recipe(family)
    trainer = tools.trainer(recipe)
    losses = []
    for _ in range(12):
        step, frames = tools.step(recipe, trainer.position, stage="sft", hyperparameters={"sft.lr": 1e-2})
        losses.append(trainer.compute(step, frames).metrics["loss"])
        trainer.apply(commit(step))
    assert losses[-1] < 0.7 * losses[0]
    assert trainer.position == Position(0, 12, 12)


def test_grpo_raises_the_log_prob_of_better_samples_and_lowers_that_of_worse(tools: Any) -> None:
    recipe = tools.recipe()
    trainer = tools.trainer(recipe)
    step, frames = tools.step(recipe, groups=1)
    group = msgspec.structs.replace(step.groups[0], advantages=[1.0, -1.0])
    step = msgspec.structs.replace(step, groups=[group])

    def logprobs() -> dict[float, float]:
        found = {}
        for s in sequences_of(step, frames):
            [(logprobs, _)] = trainer.layout.predict([pack([Row((s,))])])
            found[s.advantage] = logprobs.sum().item()
        return found

    before = logprobs()
    trainer.compute(step, frames)
    trainer.apply(commit(step))
    after = logprobs()
    assert after[1.0] > before[1.0] and after[-1.0] < before[-1.0]


def test_asking_again_gives_the_same_vote_and_applies_nothing_twice(tools: Any) -> None:
    recipe = tools.recipe()
    trainer = tools.trainer(recipe)
    step, frames = tools.step(recipe)
    vote = trainer.compute(step, frames)
    assert trainer.compute(step, frames) is vote
    applied = trainer.apply(commit(step))
    assert applied == StepApplied(0, Position(0, 1, 1), applied.metrics)
    after = tools.weights(trainer)
    assert trainer.apply(commit(step)) == applied
    assert trainer.compute(step, frames) == applied  # the attempt is over: neither redone nor refused
    close(tools.weights(trainer), after, 0)
    assert trainer.position == Position(0, 1, 1)


def test_gradients_change_no_weight_before_the_commit(tools: Any) -> None:
    recipe = tools.recipe()
    trainer = tools.trainer(recipe)
    before = tools.weights(trainer)
    trainer.compute(*tools.step(recipe))
    close(tools.weights(trainer), before, 0)


def test_a_new_attempt_gives_what_an_undisturbed_first_one_would_have(tools: Any) -> None:
    recipe = tools.recipe()
    disturbed, undisturbed = tools.trainer(recipe), tools.trainer(recipe)
    disturbed.compute(*tools.step(recipe, seed=7, of=2))
    disturbed.drop(step=0, attempt=1, lineage=0)
    with pytest.raises(TrainerError, match="gradients in hand are of None"):
        disturbed.apply(CommitStep(0, 1, 0))
    assert disturbed.between_batches
    disturbed.compute(*tools.step(recipe, attempt=2))
    undisturbed.compute(*tools.step(recipe))
    close(tools.gradients(disturbed), tools.gradients(undisturbed), 0)


def test_an_abort_of_another_attempt_leaves_the_gradients_in_hand(tools: Any) -> None:
    recipe = tools.recipe()
    trainer = tools.trainer(recipe)
    step, frames = tools.step(recipe, attempt=2)
    vote = trainer.compute(step, frames)
    trainer.drop(step=0, attempt=1, lineage=0)
    trainer.drop(step=0, attempt=2, lineage=1)
    assert trainer.compute(step, frames) is vote


def test_commits_of_another_step_attempt_or_lineage_are_refused(tools: Any) -> None:
    recipe = tools.recipe()
    trainer = tools.trainer(recipe)
    trainer.compute(*tools.step(recipe))
    before = tools.weights(trainer)
    for wrong in (CommitStep(1, 1, 0), CommitStep(0, 2, 0), CommitStep(0, 1, 1)):
        with pytest.raises(TrainerError, match="gradients in hand"):
            trainer.apply(wrong)
    close(tools.weights(trainer), before, 0)


def test_a_step_that_starts_from_another_state_is_refused(tools: Any) -> None:
    recipe = tools.recipe()
    trainer = tools.trainer(recipe)
    for wrong in (Position(0, 1, 1), Position(1, 0, 0)):
        with pytest.raises(TrainerError, match="but this replica holds"):
            trainer.compute(*tools.step(recipe, wrong))


@pytest.mark.parametrize("where", ["weights", "advantages"])
def test_gradients_that_are_not_finite_are_a_no_and_are_never_applied(tools: Any, where: str) -> None:
    recipe = tools.recipe()
    trainer = tools.trainer(recipe)
    step, frames = tools.step(recipe)
    if where == "weights":
        with torch.no_grad():
            next(trainer.model.parameters())[:, 0] = math.nan
    else:
        group = msgspec.structs.replace(step.groups[0], advantages=[math.inf, 1.0])
        step = msgspec.structs.replace(step, groups=[group, *step.groups[1:]])
    vote = trainer.compute(step, frames)
    assert vote.finite is False
    assert trainer.compute(step, frames) is vote
    with pytest.raises(TrainerError, match="voted against"):
        trainer.apply(commit(step))
    trainer.drop(step.step, step.attempt, 0)
    assert not any(gradient.any() for gradient in tools.gradients(trainer).values())
    assert trainer.position == tools.start


def test_a_step_without_response_tokens_votes_yes_with_zero_gradients(tools: Any) -> None:
    recipe = tools.recipe()
    trainer = tools.trainer(recipe)
    vote = trainer.compute(*tools.step(recipe, empty=True))
    assert vote.finite and vote.metrics["loss"] == 0.0 and vote.metrics["grad_norm"] == 0.0
    assert all((g == 0).all() for g in tools.gradients(trainer).values())


def test_gradients_are_clipped_to_the_global_norm(tools: Any) -> None:
    recipe = tools.recipe()
    free, clipped = tools.trainer(recipe), tools.trainer(recipe)
    norm = free.compute(*tools.step(recipe, hyperparameters={"train.grad_clip": 1e9})).metrics["grad_norm"]
    vote = clipped.compute(*tools.step(recipe, hyperparameters={"train.grad_clip": norm / 4}))
    assert vote.metrics["grad_norm"] == norm
    total = math.sqrt(sum(float((g**2).sum()) for g in tools.gradients(clipped).values()))
    assert total == pytest.approx(norm / 4, rel=1e-4)


def run_batch(trainer: Trainer, tools: Any, parts: list[slice], passes: int = 1, **more: Any) -> list[GradientsReady]:
    """One batch of minibatches over the same groups, `passes` times."""
    votes = []
    plan = parts * passes
    for index, part in enumerate(plan):
        position = trainer.position
        step, frames = tools.step(trainer.recipe, position, keep=part, index=index, of=len(plan), **more)
        votes.append(trainer.compute(step, frames))
        trainer.apply(commit(step))
    return votes


def test_the_version_rises_with_the_last_step_of_a_batch_alone(tools: Any) -> None:
    trainer = tools.trainer(tools.recipe())
    recipe = trainer.recipe
    seen = []
    for index in range(3):
        step, frames = tools.step(recipe, trainer.position, index=index, of=3)
        trainer.compute(step, frames)
        trainer.apply(commit(step))
        seen.append((trainer.position.version, trainer.position.step, trainer.between_batches))
    assert seen == [(0, 1, False), (0, 2, False), (1, 3, True)]


def test_later_steps_of_a_batch_are_compared_with_the_weights_it_started_from(tools: Any) -> None:
    trainer = tools.trainer(tools.recipe())
    votes = run_batch(trainer, tools, [slice(None)], passes=3, hyperparameters={"train.lr": 5e-2})
    drift = [vote.metrics["kl_old"] for vote in votes]
    assert drift[0] == 0.0 and drift[1] > 1e-3 and drift[2] > 1e-3
    # the engine is compared with the same weights in every pass
    mismatch = [vote.metrics["mismatch_kl"] for vote in votes]
    assert mismatch == pytest.approx([mismatch[0]] * 3, rel=1e-5)
    assert votes[1].metrics["clip_share"] > 0


def test_a_run_of_several_engines_has_the_mismatch_of_each(tools: Any) -> None:
    recipe = tools.recipe(rollout__engine=["transformers", "vllm", "sglang"])
    step, frames = tools.step(recipe, groups=3)
    groups = [structs.replace(group, replica=f"rollout-{number % 2}") for number, group in enumerate(step.groups)]
    mixed = structs.replace(step, groups=groups)
    both = tools.trainer(recipe).compute(mixed, frames).metrics
    alone = tools.trainer(tools.recipe()).compute(step, frames).metrics
    assert not [name for name in alone if name.startswith("mismatch_abs/")]
    tokens = [sum(group.lengths) for group in groups]
    mine, other = both["mismatch_abs/transformers"], both["mismatch_abs/vllm"]
    whole = ((tokens[0] + tokens[2]) * mine + tokens[1] * other) / sum(tokens)
    assert whole == pytest.approx(both["mismatch_abs"], rel=1e-5) == pytest.approx(alone["mismatch_abs"], rel=1e-5)
    assert "mismatch_abs/sglang" not in both, "it drew nothing"


def test_a_later_step_of_a_batch_whose_first_was_not_seen_is_refused(tools: Any) -> None:
    recipe = tools.recipe()
    with pytest.raises(TrainerError, match="whose first this replica has not seen"):
        tools.trainer(recipe).compute(*tools.step(recipe, index=1, of=2))


def test_a_batch_whose_last_steps_were_struck_off_ends_with_the_weights_it_has(tools: Any) -> None:
    recipe = tools.recipe()
    trainer = tools.trainer(recipe)
    step, frames = tools.step(recipe, of=2)
    trainer.compute(step, frames)
    trainer.apply(commit(step))
    assert trainer.position == Position(0, 0, 1)
    trainer.compute(*tools.step(recipe, Position(0, 1, 1)))
    assert trainer.position == Position(0, 1, 1)


def test_kl_is_measured_against_the_first_weights_of_the_stage(tools: Any) -> None:
    trainer = tools.trainer(tools.recipe())
    run_batch(trainer, tools, [slice(None)], stage="sft", hyperparameters={"sft.lr": 1e-2})
    first = tools.weights(trainer)
    votes = [run_batch(trainer, tools, [slice(None)], seed=9, hyperparameters={"train.lr": 1e-2})[0] for _ in range(2)]
    assert votes[0].metrics["kl_reference"] == pytest.approx(0.0, abs=1e-7)
    assert votes[1].metrics["kl_reference"] > 1e-4
    close(trainer.reference.tensors, first, 0)


def test_kl_weight_zero_computes_no_reference_and_may_be_raised_later(tools: Any) -> None:
    trainer = tools.trainer(tools.recipe())
    (vote,) = run_batch(trainer, tools, [slice(None)], hyperparameters={"train.kl_weight": 0.0, "train.lr": 1e-2})
    assert "kl_reference" not in vote.metrics
    (vote,) = run_batch(trainer, tools, [slice(None)], hyperparameters={"train.kl_weight": 0.1})
    assert vote.metrics["kl_reference"] > 0


def test_a_new_stage_resets_the_optimizer_and_its_warm_up(tools: Any) -> None:
    trainer = tools.trainer(tools.recipe())
    rates = []
    for stage in ("sft", "sft", "sft", "train"):
        step, frames = tools.step(trainer.recipe, trainer.position, stage=stage, hyperparameters={"train.lr": 3e-4})
        trainer.compute(step, frames)
        rates.append(trainer.apply(commit(step)).metrics["lr"])
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3, 3e-4])
    assert trainer.optimizer.steps == 1


def test_live_hyper_parameters_come_with_the_step(tools: Any) -> None:
    recipe = tools.recipe()
    votes = [
        tools.trainer(recipe).compute(*tools.step(recipe, hyperparameters={"train.is_cap": cap})).metrics
        for cap in (1e-3, 1e9)
    ]
    assert votes[0]["importance_cut"] == 1.0 and votes[1]["importance_cut"] == 0.0


def test_temperature_scales_the_distribution_that_is_trained(tools: Any) -> None:
    recipe = tools.recipe()
    entropies = [
        tools.trainer(recipe).compute(*tools.step(recipe, temperature=t)).metrics["entropy"] for t in (0.2, 1.0)
    ]
    assert entropies[0] < entropies[1]


def test_bfloat16_parameters_do_not_lose_small_updates(tools: Any) -> None:
    recipe = tools.recipe(model__dtype="bfloat16")
    trainer = tools.trainer(recipe)
    assert next(trainer.model.parameters()).dtype == torch.bfloat16
    before = tools.weights(trainer)
    for _ in range(60):
        step, frames = tools.step(recipe, trainer.position, stage="sft", hyperparameters={"sft.lr": 1e-4})
        trainer.compute(step, frames)
        trainer.apply(commit(step))
    name = "model.norm.weight"  # ones: a single update of 1e-4 is far below half a unit in the last place
    assert (trainer.model.get_parameter(name) != before[name]).any()
