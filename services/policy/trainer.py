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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Literal, cast

from torch import Tensor

from services.policy.batch import Frame, rows_of, sequences_of
from services.policy.correction import Correction, CorrectionSettings, Level
from services.policy.heap import trim
from services.policy.layouts.compose import Layout
from services.policy.losses import GrpoSettings, LossResult, grpo_loss, sft_loss, token_weights
from services.policy.mismatch import Diagnosis, diagnose, mean_by_engine, names_by_engine, sums_by_engine
from services.policy.optimizer import Optimizer
from services.policy.packing import MicroBatch
from services.policy.reduce import reduce_gradients, reduce_metrics
from services.policy.speed import FLOPS, FORWARD, MEMORY, PEAK, STEP, TOKENS, peak_flops, peak_memory, rates, work_of
from shared.config import Recipe
from shared.config.schema import OptimizerTable
from shared.mesh import Mesh
from shared.messages import CommitStep, GradientsReady, Position, StepApplied, TrainStep
from shared.telemetry import get_logger

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
    """One replica's model in training, or one rank's part of it.

    `layout` is the model. `meshes` lends the formed mesh of an epoch, for steps with several members. All ranks of a
    replica are asked the same in the same order: they meet in collectives.
    """

    def __init__(
        self,
        layout: Layout,
        recipe: Recipe,
        position: Position,
        meshes: Callable[[int], AbstractContextManager[Mesh]],
    ) -> None:
        self.layout = layout
        self.model = layout.model
        self.recipe = recipe
        self.position = position
        self.stage: Stage | None = None
        self.optimizer: Optimizer | None = None
        self.reference: Snapshot | None = None
        self._behaviour: Snapshot | None = None
        self._next_look = 0
        self._meshes = meshes
        self._hand: Hand | None = None
        self._applied: tuple[CommitStep, StepApplied] | None = None
        self.device = next(self.model.parameters()).device
        self._width = int(self.model.config.get_text_config().hidden_size)
        self._peak = peak_flops(self.device, next(self.model.parameters()).dtype)

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
        metrics["train_seconds"] = seconds = time.perf_counter() - started
        work = {name: metrics.pop(name) for name in (TOKENS, FLOPS, PEAK)}
        metrics |= rates(work, seconds)
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
        trim(self.device)
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
            tensors = {name: reference.tensors[name] for name in self.layout.parameters()}
            reference = Snapshot(reference.position, tensors)
        self.stage, self.optimizer, self.reference = stage, None, reference
        self._behaviour, self._hand, self._applied = None, None, None
        if stage is not None:
            self.optimizer = self._new_optimizer(stage)
            self.optimizer.restore(steps, optimizer)

    def begin_stage(self, stage: Stage) -> None:
        """A fresh optimizer and schedule; RL also keeps the weights it starts from, the reference of its KL term.

        The reference is taken whatever `kl_weight` is now: it is live, and the first weights cannot be had later.
        """
        self.stage = stage
        self.optimizer = self._new_optimizer(stage)
        self.reference = self._snapshot() if stage == "train" else None
        self._behaviour = None

    # --- gradients --------------------------------------------------------------------------------------------------

    def _gradients(self, step: TrainStep, frames: Sequence[Frame]) -> tuple[dict[str, float], bool]:
        assert self.optimizer is not None
        limit = self.recipe.policy.micro_batch_tokens
        rows = rows_of(sequences_of(step, frames), limit, self._width)
        micros = [micro.to(self.device) for micro in self.layout.micro_batches(rows, limit)]
        self.optimizer.clear()
        totals = _Totals(_metric_names(step, self.recipe, self.reference is not None))
        kl = step.stage == "train" and _grpo_settings(step).kl_weight > 0
        before, reference = self._behaviour if step.index > 0 else None, self.reference if kl else None
        olds, references = self._predicted(micros, before), self._predicted(micros, reference)

        def loss(index: int, found: tuple[Tensor, Tensor]) -> Tensor:
            result = self._loss(step, micros[index], *found, olds[index], references[index])
            totals.add(result)
            return result.loss

        self.layout.train(micros, loss, self.optimizer.collect)
        trim(self.device)  # activations are gone; what follows has its own tensors
        gradients = self.optimizer.gradients()
        self.layout.sum_gradients(gradients)
        maxima = {**totals.maxima, MEMORY: peak_memory(self.device)}
        sums, maxima = self.layout.sum_metrics(totals.sums, maxima)
        passes = STEP + FORWARD * sum(weights is not None for weights in (before, reference))
        work = work_of(rows, self.model.config, passes, self.layout.grid.parallel.world, self._peak)
        sums |= work
        if step.mesh is not None:
            with self.layout.failing_together(), self._meshes(step.mesh) as mesh:
                reduce_gradients(list(gradients.values()), mesh, self.recipe.weights.bucket_mb * MEGABYTE)
                sums, maxima = reduce_metrics(sums, maxima, mesh)
        if step.index == 0 and micros and self.layout.whole:
            self._look_at_mismatch(step, micros[0], sums.get("mismatch_abs", 0.0))
        sums = mean_by_engine(sums)
        norm = self.layout.norm(gradients)
        finite = math.isfinite(float(norm)) and math.isfinite(sums["loss"])
        if finite:
            self.optimizer.clip(norm, _live(step, "grad_clip"))
        else:
            self.optimizer.clear()
        return {**sums, **maxima, "grad_norm": float(norm)}, finite

    def _predicted(self, micros: Sequence[MicroBatch], weights: Snapshot | None) -> list[Tensor | None]:
        """Log-probabilities [T] of each micro-batch's tokens under a snapshot's weights; None for each without one."""
        if weights is None:
            return [None] * len(micros)
        with self._under(weights.tensors):
            return [None if found is None else found[0] for found in self.layout.predict(micros)]

    @contextmanager
    def _under(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """The model with other weights, which are exchanged for its own meanwhile."""
        self.layout.swap(weights)
        try:
            yield
        finally:
            self.layout.swap(weights)

    def _look_at_mismatch(self, step: TrainStep, micro: MicroBatch, mismatch: float) -> None:
        """Say, once in a while, why the engines may disagree with this model more than they should."""
        train = self.recipe.train
        if train is None or mismatch <= train.mismatch_warning or step.step < self._next_look:
            return
        self._next_look = step.step + LOOK_AGAIN_STEPS
        likely = self.cause_of_mismatch(micro.to(self.device))
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
            with self._under(weights or {}):
                found: Tensor = self.layout.predict([tried])[0][0]
                return found

        reference = self.reference.tensors if self.reference is not None else None
        step_back = self.optimizer.step_back() if self.optimizer is not None else {}
        return diagnose(micro, self.model, step_back, reference, logprobs)

    def _loss(
        self,
        step: TrainStep,
        micro: MicroBatch,
        logprobs: Tensor,
        entropy: Tensor,
        old: Tensor | None,
        reference: Tensor | None,
    ) -> LossResult:
        if step.stage == "sft":
            weights = token_weights(micro.lengths, "token_mean", tokens=step.tokens, sequences=step.sequences)
            return sft_loss(logprobs, entropy, weights, tokens=step.tokens)
        assert self.recipe.train is not None
        old = logprobs.detach() if old is None else old
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
            _grpo_settings(step),
            tokens=step.tokens,
        )
        return replace(result, sums=result.sums | sums_by_engine(micro, old, self.recipe.rollout))

    def _snapshot(self) -> Snapshot:
        return Snapshot(self.position, {name: part.clone() for name, part in self.layout.weights().items()})

    def _new_optimizer(self, stage: Stage) -> Optimizer:
        offload = self.recipe.policy.optimizer_offload
        return Optimizer(self.layout.parameters().items(), self._table(stage), offload=offload)

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
