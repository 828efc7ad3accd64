"""The trainer: model, optimizer and the state machine of one step at a time. Driven by the service, or by a replay.

    none -- compute --> gradients (step, attempt) -- apply --> applied (step)
                            |                                     |
                            +-- drop --> none          compute of the next step

Invariants: weights change in `apply` alone, and only for the attempt whose gradients are in hand and finite. Asking
again gives the same answer and does nothing twice. A stage begins with a new optimizer and schedule.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from services.policy.batch import Frame, MicroBatch, micro_batches, rows_of, sequences_of
from services.policy.correction import Correction, CorrectionSettings, Level
from services.policy.losses import GrpoSettings, LossResult, grpo_loss, sft_loss, token_logprobs, token_weights
from services.policy.mismatch import Diagnosis, diagnose, mean_by_engine, names_by_engine, sums_by_engine
from services.policy.optimizer import Optimizer
from services.policy.reduce import reduce_gradients, reduce_metrics
from shared.config import Recipe
from shared.config.schema import OptimizerTable
from shared.mesh import Mesh
from shared.messages import CommitStep, GradientsReady, Position, StepApplied, TrainStep
from shared.telemetry import get_logger

if TYPE_CHECKING:
    from services.policy.ranks.group import Ranks

Stage = Literal["sft", "train"]
MEGABYTE = 1 << 20
LOOK_AGAIN_STEPS = 50
"""Steps between two searches for the cause of a mismatch, which cost some twenty forward passes each."""


class TrainerError(Exception):
    """A command that does not fit the trainer's state; the text says what was expected and what came."""


@dataclass(frozen=True)
class Snapshot:
    """A copy of all parameters (tied ones once) as they were at `position`."""

    position: Position
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Hand:
    """The step whose gradients are in hand, and the vote that went out for it."""

    step: TrainStep
    vote: GradientsReady


class Trainer:
    """One replica's model in training. `meshes` lends the formed mesh of an epoch, for steps with several members.

    `ranks` are those of a replica of several, None alone: then every rank has a trainer, and all make the same calls.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        recipe: Recipe,
        position: Position,
        meshes: Callable[[int], AbstractContextManager[Mesh]],
        ranks: Ranks | None = None,
    ) -> None:
        # dropout would make the trainer disagree with the engine about the same tokens
        self.model = model.eval()
        self.recipe = recipe
        self.position = position
        self.stage: Stage | None = None
        self.optimizer: Optimizer | None = None
        self.reference: Snapshot | None = None
        self._behaviour: Snapshot | None = None
        self._next_look = 0
        self._meshes = meshes
        self._ranks = ranks
        self._hand: Hand | None = None
        self._applied: tuple[CommitStep, StepApplied] | None = None
        self._device = next(model.parameters()).device
        self._width = int(model.config.get_text_config().hidden_size)

    # --- the state machine ------------------------------------------------------------------------------------------

    @property
    def between_batches(self) -> bool:
        """True when the weights are those of a version, not of a step inside a batch."""
        return self._behaviour is None or self._behaviour.position == self.position

    def compute(self, step: TrainStep, frames: Sequence[Frame]) -> GradientsReady | StepApplied:
        """Gradients of `step`, reduced over its members and clipped, are in hand afterwards; nothing is applied.

        `finite` is False, and nothing is in hand, when the loss or the gradient norm is not a finite number. An attempt
        that was applied already is answered as such. Raises TrainerError for a step that starts elsewhere, BatchError
        for a payload that does not fit, MeshError.
        """
        if self._hand is not None and _names(self._hand.step) == _names(step):
            return self._hand.vote
        if self._applied is not None and self._applied[0] == CommitStep(step.step, step.attempt, step.position.lineage):
            return self._applied[1]
        if step.index == 0:
            self.adopt(step.position)
        if step.position != self.position:
            raise TrainerError(f"step {step.step} starts from {step.position}, but this replica holds {self.position}")
        self._hand = None
        if step.stage != self.stage or self.optimizer is None:
            self.begin_stage(step.stage)
        if step.index == 0:
            self._behaviour = self._snapshot() if step.steps_in_batch > 1 else None
        elif self._behaviour is None:
            raise TrainerError(
                f"step {step.step} is number {step.index} of its batch, whose first this replica has not seen"
            )
        started = time.perf_counter()
        metrics, finite = self._gradients(step, frames)
        metrics["train_seconds"] = time.perf_counter() - started
        vote = GradientsReady(step.step, step.attempt, step.position.lineage, finite, metrics)
        self._hand = Hand(step, vote)
        return vote

    def apply(self, commit: CommitStep) -> StepApplied:
        """Step the optimizer with the gradients in hand; TrainerError if they are of another attempt or not finite."""
        if self._applied is not None and self._applied[0] == commit:
            return self._applied[1]
        wanted = (commit.lineage, commit.step, commit.attempt)
        held = _names(self._hand.step) if self._hand is not None else None
        if self._hand is None or self.optimizer is None or held != wanted:
            raise TrainerError(f"commit of (lineage, step, attempt) {wanted}, but the gradients in hand are of {held}")
        if not self._hand.vote.finite:
            raise TrainerError(
                f"commit of step {commit.step} attempt {commit.attempt}, which this replica voted against"
            )
        step = self._hand.step
        lr = self.optimizer.step(_live(step, "lr"), _live(step, "weight_decay"))
        last = step.index == step.steps_in_batch - 1
        held_now = self.position
        self.position = Position(held_now.lineage, held_now.version + int(last), held_now.step + 1)
        self._hand = None
        if last:
            self._behaviour = None
        answer = StepApplied(commit.step, self.position, {"lr": lr})
        self._applied = (commit, answer)
        return answer

    def adopt(self, position: Position) -> None:
        """Take over the version of `position` if the weights are its own: the rest of a batch was struck off."""
        held = self.position
        if (held.lineage, held.step) == (position.lineage, position.step) and held.version < position.version:
            self.position = position
            self._behaviour = None

    def drop(self, step: int, attempt: int, lineage: int) -> None:
        """Forget the gradients of this attempt; anything else in hand stays."""
        if self._hand is not None and _names(self._hand.step) == (lineage, step, attempt):
            self._hand = None
            if self.optimizer is not None:
                self.optimizer.clear()

    def restore(
        self,
        position: Position,
        stage: Stage | None,
        steps: int,
        optimizer: Mapping[str, Tensor],
        reference: Snapshot | None,
    ) -> None:
        """Go on from a checkpoint whose model tensors are in the model already; KeyError where a tensor is missing."""
        self.position = position
        if reference is not None:  # a file's own order is another one; what peers exchange goes by the model's
            tensors = {name: reference.tensors[name] for name, _ in self.model.named_parameters()}
            reference = Snapshot(reference.position, tensors)
        self.stage, self.optimizer, self.reference = stage, None, reference
        self._behaviour, self._hand, self._applied = None, None, None
        if stage is not None:
            self.optimizer = Optimizer(self.model.named_parameters(), self._table(stage))
            self.optimizer.restore(steps, optimizer)

    def begin_stage(self, stage: Stage) -> None:
        """A fresh optimizer and schedule; RL also keeps the weights it starts from, the reference of its KL term.

        The reference is taken whatever `kl_weight` is now: it is live, and the first weights cannot be had later.
        """
        self.stage = stage
        self.optimizer = Optimizer(self.model.named_parameters(), self._table(stage))
        self.reference = self._snapshot() if stage == "train" else None
        self._behaviour = None

    # --- gradients --------------------------------------------------------------------------------------------------

    def _gradients(self, step: TrainStep, frames: Sequence[Frame]) -> tuple[dict[str, float], bool]:
        assert self.optimizer is not None
        limit = self.recipe.policy.micro_batch_tokens
        rows = rows_of(sequences_of(step, frames), limit, self._width)
        if self._ranks is not None:
            rows = self._ranks.share(rows)
        batches = micro_batches(rows, limit, pad=0)
        self.optimizer.clear()
        totals = _Totals(_metric_names(step, self.recipe, self.reference is not None))
        for micro in batches:
            result = self._loss(step, micro.to(self._device))
            result.loss.backward()
            self.optimizer.collect()
            totals.add(result)
        sums, maxima = totals.sums, totals.maxima
        gradients = self.optimizer.gradients()
        if self._ranks is not None:
            self._ranks.sum_gradients(gradients)
            sums, maxima = self._ranks.sum_metrics(sums, maxima)
        if step.mesh is not None:
            together = self._ranks.failing_together() if self._ranks is not None else nullcontext()
            with together, self._meshes(step.mesh) as mesh:
                reduce_gradients(gradients, mesh, self.recipe.weights.bucket_mb * MEGABYTE)
                sums, maxima = reduce_metrics(sums, maxima, mesh)
        first = self._ranks is None or self._ranks.rank == 0  # one of them is enough to say it
        if step.index == 0 and batches and first:
            self._look_at_mismatch(step, batches[0], sums.get("mismatch_abs", 0.0))
        sums = mean_by_engine(sums)
        norm = self.optimizer.clip(_live(step, "grad_clip"))
        finite = math.isfinite(norm) and math.isfinite(sums["loss"])
        if not finite:
            self.optimizer.clear()
        return {**sums, **maxima, "grad_norm": norm}, finite

    def _look_at_mismatch(self, step: TrainStep, micro: MicroBatch, mismatch: float) -> None:
        """Say, once in a while, why the engines may disagree with this model more than they should."""
        train = self.recipe.train
        if train is None or mismatch <= train.mismatch_warning or step.step < self._next_look:
            return
        self._next_look = step.step + LOOK_AGAIN_STEPS
        likely = self.cause_of_mismatch(micro.to(self._device))
        get_logger().warning(
            "engine and trainer disagree about the tokens that were drawn",
            step=step.step,
            mismatch=round(mismatch, 4),
            allowed=train.mismatch_warning,
            likely=likely.cause,
            why=str(likely),
        )

    def cause_of_mismatch(self, micro: MicroBatch) -> Diagnosis:
        """Why this model disagrees with the engine's log-probabilities of the micro-batch."""

        def logprobs(tried: MicroBatch, weights: Mapping[str, Tensor] | None) -> Tensor:
            return self._logprobs(tried, Snapshot(self.position, dict(weights)) if weights is not None else None)[0]

        reference = self.reference.tensors if self.reference is not None else None
        step_back = self.optimizer.step_back() if self.optimizer is not None else {}
        return diagnose(micro, self.model, step_back, reference, logprobs)

    def _loss(self, step: TrainStep, micro: MicroBatch) -> LossResult:
        if step.stage == "sft":
            logprobs, entropy = self._logprobs(micro)
            weights = token_weights(micro.lengths, "token_mean", tokens=step.tokens, sequences=step.sequences)
            return sft_loss(logprobs, entropy, weights, tokens=step.tokens)
        logprobs, entropy = self._logprobs(micro)
        settings = _grpo_settings(step)
        with torch.no_grad():
            old = logprobs.detach()
            if step.index > 0 and self._behaviour is not None:
                old, _ = self._logprobs(micro, self._behaviour)
            reference = None
            if settings.kl_weight > 0 and self.reference is not None:
                reference, _ = self._logprobs(micro, self.reference)
        assert self.recipe.train is not None
        weights = token_weights(
            micro.lengths,
            self.recipe.train.reduction,
            tokens=step.tokens,
            sequences=step.sequences,
            constant=int(step.hyperparameters["rollout.max_new_tokens"]),
        )
        result = grpo_loss(
            logprobs,
            old,
            micro.engine_logprobs,
            reference,
            micro.advantages,
            entropy,
            weights,
            micro.lengths,
            settings,
            tokens=step.tokens,
        )
        return replace(result, sums=result.sums | sums_by_engine(micro, old, self.recipe.rollout))

    def _logprobs(self, micro: MicroBatch, weights: Snapshot | None = None) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies [T] of the response tokens, under the model's own or a snapshot's weights."""
        inputs: dict[str, Any] = {
            "input_ids": micro.inputs,
            "attention_mask": micro.mask(self.model.dtype),
            "position_ids": micro.positions,
            "logits_to_keep": micro.keep,
            "use_cache": False,
        }
        if weights is None:
            logits = self.model(**inputs).logits
        else:
            logits = functional_call(self.model, weights.tensors, (), inputs).logits
        picked = logits.flatten(0, 1).index_select(0, micro.picks)
        return token_logprobs(picked, micro.targets, micro.temperatures)

    def _snapshot(self) -> Snapshot:
        return Snapshot(self.position, {n: p.detach().clone() for n, p in self.model.named_parameters()})

    def _table(self, stage: Stage) -> OptimizerTable:
        table = self.recipe.sft if stage == "sft" else self.recipe.train
        if table is None:
            raise TrainerError(f"a step of stage {stage!r}, but the recipe has no [{stage}] table")
        return table


class _Totals:
    """Sums and maxima over micro-batches; every name is there even when no micro-batch came."""

    def __init__(self, names: tuple[tuple[str, ...], tuple[str, ...]]) -> None:
        self.sums = dict.fromkeys(names[0], 0.0)
        self.maxima = dict.fromkeys(names[1], 0.0)

    def add(self, result: LossResult) -> None:
        for name, value in result.sums.items():
            self.sums[name] += float(value)
        for name, value in result.maxima.items():
            self.maxima[name] = max(self.maxima[name], float(value))


def _metric_names(step: TrainStep, recipe: Recipe, reference: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if step.stage == "sft":
        return ("loss", "entropy"), ()
    kl = ("kl_reference",) if reference and _grpo_settings(step).kl_weight > 0 else ()
    sums: tuple[str, ...] = ("loss", "entropy", "clip_share", "kl_old", "mismatch_abs", "mismatch_kl")
    sums = (*sums, "mismatch_outside", "importance_mean", "importance_cut", *kl, *names_by_engine(recipe.rollout))
    return sums, ("mismatch_max",)


def _grpo_settings(step: TrainStep) -> GrpoSettings:
    importance = CorrectionSettings(
        cast(Correction, step.hyperparameters["train.is_correction"]),
        cast(Level, step.hyperparameters["train.is_level"]),
        floor=_live(step, "is_floor"),
        cap=_live(step, "is_cap"),
    )
    return GrpoSettings(_live(step, "clip_low"), _live(step, "clip_high"), _live(step, "kl_weight"), importance)


def _live(step: TrainStep, name: str) -> float:
    """A live hyper-parameter of the step's own stage: `lr` -> hyperparameters["train.lr"]."""
    return float(step.hyperparameters[f"{step.stage}.{name}"])


def _names(step: TrainStep) -> tuple[int, int, int]:
    return step.position.lineage, step.step, step.attempt
