"""AdamW with its schedule, and the gradients in hand. Owned by the trainer, one for each stage.

Invariants: float32 is what is optimised, and what gradients are accumulated in. A parameter of lower precision has a
float32 master copy here, from which it is rounded after each step, so that small updates are never lost. Where moments
and masters live between steps changes no bit of the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from services.policy.layouts.data import local
from shared.config.schema import OptimizerTable, TrainTable

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
EPSILON = 1e-8
VISIT_ELEMENTS = 16 << 20
"""About how many parameters have their state on the device at one time, when it lives in the host's memory."""


class Optimizer:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) over named parameters; weight decay skips biases and norms.

    With `offload`, moments and masters live in the host's memory (pinned, where there is a device to copy to) and visit
    the device for the step, some parameters at a time.
    """

    def __init__(
        self, parameters: Iterable[tuple[str, nn.Parameter]], table: OptimizerTable, *, offload: bool = False
    ) -> None:
        self._parameters = {name: p for name, p in parameters if p.requires_grad}
        # of a sharded parameter, what this rank has
        self._weights = {name: local(p.detach()) for name, p in self._parameters.items()}
        self._gradients: dict[str, Tensor] = {}
        self._offload = offload
        self.steps = 0
        self._rate = 0.0  # of the last step that was made here
        self._warmup, self._schedule = table.warmup_steps, table.schedule
        self._planned = table.batches * (table.mu * table.minibatches if isinstance(table, TrainTable) else 1)
        self._betas = (table.beta1, table.beta2)
        # moments are there from the first step on
        self._state: dict[str, dict[str, Tensor]] = {MASTER: {}, **{moment: {} for moment in MOMENTS}}
        for name, weight in self._weights.items():
            if weight.dtype != torch.float32:
                self._state[MASTER][name] = self._kept(weight, name)

    # --- gradients --------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Drop all gradients, those in hand included."""
        for parameter in self._parameters.values():
            parameter.grad = None
        self._gradients.clear()

    def collect(self) -> None:
        """Move what backward left on the parameters into the gradients in hand; call after each micro-batch."""
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            if name not in self._gradients:
                self._gradients[name] = local(parameter.grad).to(torch.float32)
            else:
                self._gradients[name] += local(parameter.grad)
            parameter.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """The float32 gradients in hand, one for every parameter in the model's order, zeros where none came.

        Every member of a mesh has the same ones, even where (in an MoE) its own tokens never reached some expert.
        """
        for name, weight in self._weights.items():
            if name not in self._gradients:
                self._gradients[name] = torch.zeros_like(weight, dtype=torch.float32)
        return {name: self._gradients[name] for name in self._weights}

    def clip(self, norm: Tensor, limit: float) -> None:
        """Scale the gradients in hand, whose global norm is `norm`, to one of at most `limit`."""
        scale = limit / (norm + 1e-6)
        if scale < 1.0:
            for gradient in self.gradients().values():
                gradient.mul_(scale)

    # --- a step -----------------------------------------------------------------------------------------------------

    def rate(self, lr: float) -> float:
        """Learning rate of the next step: linear warm-up to `lr`, then `lr`, or a fall that ends with the last step."""
        if self.steps < self._warmup:
            return lr * (self.steps + 1) / self._warmup
        if self._schedule == "constant":
            return lr
        return lr * max(0.0, (self._planned - self.steps) / max(1, self._planned - self._warmup))

    @torch.no_grad()
    def step(self, lr: float, weight_decay: float) -> float:
        """Apply the gradients in hand and drop them; returns the learning rate used."""
        self._rate = self.rate(lr)
        gradients = self.gradients()
        for moment in MOMENTS if not self.steps else ():
            self._state[moment] = {name: self._kept(torch.zeros_like(g), name) for name, g in gradients.items()}
        for names, decayed in self._turns():
            self._step(names, weight_decay if decayed else 0.0)
        if self._offload and any(weight.device.type != "cpu" for weight in self._weights.values()):
            torch.accelerator.synchronize()  # what went back to the host is there
        self.steps += 1
        self.clear()
        return self._rate

    def _turns(self) -> Iterator[tuple[list[str], bool]]:
        """Names of parameters that are stepped together, and whether weight decay is for them."""
        for decayed in (True, False):
            names: list[str] = []
            room = VISIT_ELEMENTS
            for name, weight in self._weights.items():
                if (weight.ndim >= 2) != decayed:
                    continue
                if self._offload and names and weight.numel() > room:
                    yield names, decayed
                    names, room = [], VISIT_ELEMENTS
                names.append(name)
                room -= weight.numel()
            if names:
                yield names, decayed

    def _step(self, names: list[str], weight_decay: float) -> None:
        visiting = {
            kind: {name: self._visit(kept[name], name) for name in names if name in kept}
            for kind, kept in self._state.items()
        }
        masters = {name: visiting[MASTER].get(name, self._weights[name]) for name in names}
        means, squares = (visiting[moment] for moment in MOMENTS)
        adamw(
            [*masters.values()],
            [self._gradients[name] for name in names],
            [*means.values()],
            [*squares.values()],
            [],
            [torch.tensor(float(self.steps)) for _ in names],  # counted on in place, each by itself
            amsgrad=False,
            beta1=self._betas[0],
            beta2=self._betas[1],
            lr=self._rate,
            weight_decay=weight_decay,
            eps=EPSILON,
            maximize=False,
        )
        for name, master in visiting[MASTER].items():
            self._weights[name].copy_(master)
        for kind, visitors in visiting.items() if self._offload else ():
            for name, visitor in visitors.items():
                self._state[kind][name].copy_(visitor, non_blocking=True)

    def _kept(self, tensor: Tensor, name: str) -> Tensor:
        """A float32 copy of what belongs to a parameter, where it lives between steps."""
        device = self._weights[name].device
        if not self._offload:
            return tensor.to(device, torch.float32, copy=True)
        pinned = device.type != "cpu"
        return torch.empty(tensor.shape, dtype=torch.float32, device="cpu", pin_memory=pinned).copy_(tensor)

    def _visit(self, kept: Tensor, name: str) -> Tensor:
        """It on the parameter's device, for the step."""
        return kept.to(self._weights[name].device, non_blocking=True, copy=True) if self._offload else kept

    def step_back(self) -> dict[str, Tensor]:
        """What to add to the weights to undo the last step, weight decay apart; empty before the first one here."""
        found: dict[str, Tensor] = {}
        beta1, beta2 = self._betas
        for name, weight in self._weights.items() if self._rate else ():
            mean, square = (self._state[moment][name].to(weight.device) for moment in MOMENTS)
            mean, square = mean / (1 - beta1**self.steps), square / (1 - beta2**self.steps)
            found[name] = self._rate * mean / (square.sqrt() + EPSILON)
        return found

    # --- its state --------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps beside `steps`: "moment/parameter" -> tensor, no moments before the first step."""
        kinds = (*MOMENTS, MASTER)
        return {
            f"{kind}/{name}": self._state[kind][name]
            for name in self._weights
            for kind in kinds
            if name in self._state[kind]
        }

    def restore(self, steps: int, tensors: Mapping[str, Tensor]) -> None:
        """Take back copies of what `tensors` gave; KeyError where one is missing."""
        self.steps, self._rate = steps, 0.0
        names = {MASTER: [*self._state[MASTER]], **{moment: [*self._weights] if steps else [] for moment in MOMENTS}}
        for kind, some in names.items():
            self._state[kind] = {name: self._kept(tensors[f"{kind}/{name}"], name) for name in some}
