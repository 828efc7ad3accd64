"""How much each engine and the trainer disagree about the tokens that the engine drew, and why.

When the mean absolute log-ratio of a batch passes `train.mismatch_warning`, each likely cause is tried out:
the log-probabilities that the engine would have had at another temperature, with rounded weights, or with older ones -
those of some optimizer steps ago, as far as the last step tells, or on the way back to those that the stage began with.
The cause that explains the most of the mismatch is named; if none explains much of a large one, the engine has read
another prompt than it recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from services.policy.packing import MicroBatch
from shared.config.schema import Quantization, RolloutTable
from shared.engines.base import EngineError
from shared.engines.quantization import quantize_dequantize, quantized_weights

Cause = Literal["temperature", "quantized", "stale", "prompt", "unknown"]
Weights = Mapping[str, Tensor]
Logprobs = Callable[[MicroBatch, Weights | None], Tensor]
"""Log-probabilities [T] of a micro-batch's tokens under given weights, or under the trainer's own."""

TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.1, 1.2, 1.4, 1.7, 2.0)
"""Tried as factors of the temperature that the batch was asked to be drawn with."""
STEPS_BACK = (1, 2, 4, 8, 16)
"""Tried as multiples of what undoes the last optimizer step."""
WAYS_BACK = (0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
"""Shares of the way from the trainer's weights back to the reference's; 1 is an engine that was never updated."""
SEPARATOR = ":"
"""In names of sums that are of one engine."""
EXPLAINED = 0.3
"""Share of the mismatch that a cause has to explain to be named."""
LARGE = 0.3
"""Mean absolute log-ratio that rounding and kernels do not reach."""

ADVICE: dict[Cause, str] = {
    "temperature": "the engine draws at another temperature than it was asked for",
    "quantized": "the engine computes with rounded weights; train.is_correction corrects for it",
    "stale": "the engine computes with older weights; lower train.max_staleness, or see whether its updates arrive",
    "prompt": "the engine has read another prompt than it recorded: compare chat template, system prompt, first token",
    "unknown": "neither temperature nor rounding nor older weights explain it: compare the engine's kernels and type",
}


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The likely cause, its particulars ("0.7 times"), and the share of the mismatch that it explains."""

    cause: Cause
    detail: str
    explained: float

    def __str__(self) -> str:
        found = f" ({self.detail} explains {100 * self.explained:.0f} % of it)" if self.detail else ""
        return f"{ADVICE[self.cause]}{found}"


def names_by_engine(table: RolloutTable) -> list[str]:
    """The sums of `sums_by_engine`: none in a run of one engine, whose mismatch is the whole one."""
    engines = sorted(set(table.engines)) if len(set(table.engines)) > 1 else []
    return [f"{name}{SEPARATOR}{engine}" for engine in engines for name in ("off", "tokens")]


@torch.no_grad()
def sums_by_engine(micro: MicroBatch, logprobs: Tensor, table: RolloutTable) -> dict[str, Tensor]:
    """Absolute log-ratios and tokens of each engine's part of the micro-batch, to be added up over all members."""
    names = names_by_engine(table)
    if not names:
        return {}
    off = (logprobs - micro.engine_logprobs).abs()
    drew = [table.engine_of(replica) for replica in micro.replicas]
    sums: dict[str, Tensor] = {}
    for engine in set(table.engines):
        mine = torch.tensor([one == engine for one in drew], device=off.device).repeat_interleave(micro.lengths)
        sums |= {f"off{SEPARATOR}{engine}": off[mine].sum(), f"tokens{SEPARATOR}{engine}": mine.sum()}
    return sums


def mean_by_engine(sums: Mapping[str, float]) -> dict[str, float]:
    """The sums of `sums_by_engine` as `mismatch_abs/ENGINE`, for engines that drew anything; others as they are."""
    found = {name: value for name, value in sums.items() if SEPARATOR not in name}
    for name, tokens in sums.items():
        kind, _, engine = name.partition(SEPARATOR)
        if kind == "tokens" and tokens:
            found[f"mismatch_abs/{engine}"] = sums[f"off{SEPARATOR}{engine}"] / tokens
    return found


@torch.no_grad()
def diagnose(
    micro: MicroBatch, model: torch.nn.Module, step_back: Weights, reference: Weights | None, logprobs: Logprobs
) -> Diagnosis:
    """The likely cause of the mismatch of this micro-batch; some twenty forward passes.

    `step_back` is what to add to the weights to undo the last step, `reference` are the stage's first weights.
    """
    whole = _off(micro, logprobs(micro, None))
    best = Diagnosis("prompt" if whole > LARGE else "unknown", "", 0.0)
    for cause, detail, tried in _tries(micro, model, step_back, reference, logprobs):
        explained = 1.0 - _off(micro, tried) / whole if whole > 0 else 0.0
        if explained >= EXPLAINED and explained > best.explained:
            best = Diagnosis(cause, detail, explained)
    return best


def _tries(
    micro: MicroBatch, model: torch.nn.Module, step_back: Weights, reference: Weights | None, logprobs: Logprobs
) -> Iterator[tuple[Cause, str, Tensor]]:
    for factor in TEMPERATURES:
        hotter = replace(micro, temperatures=micro.temperatures * factor)
        yield "temperature", f"{factor:g} times the temperature", logprobs(hotter, None)
    own = dict(model.named_parameters())
    for quantization in get_args(Quantization):
        try:
            narrow = quantized_weights(model, quantization)
        except EngineError:  # no engine could have rounded this model so
            continue
        rounded = {name: quantize_dequantize(weight, quantization) for name, weight in narrow.items()}
        yield "quantized", f"rounding to {quantization}", logprobs(micro, {**own, **rounded})
    for steps in STEPS_BACK if step_back else ():
        earlier = {**own, **{name: own[name] + steps * change for name, change in step_back.items()}}
        yield "stale", f"the last step taken back {steps} times", logprobs(micro, earlier)
    if reference is not None:
        for share in WAYS_BACK:
            earlier = {name: torch.lerp(weight, reference[name], share) for name, weight in own.items()}
            detail = "the stage's first weights" if share == 1 else "the way back to the stage's first weights"
            yield "stale", detail, logprobs(micro, earlier)


def _off(micro: MicroBatch, logprobs: Tensor) -> float:
    return float((logprobs - micro.engine_logprobs).abs().mean())
