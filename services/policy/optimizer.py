"""AdamW with its schedule, and the gradients in hand. Owned by the trainer, one for each stage.

Invariant: float32 is what is optimised. A parameter of lower precision has a float32 master copy here, into which
gradients are accumulated and from which the parameter is rounded after each step; small updates are never lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from services.policy.layouts.data import local
from shared.config.schema import OptimizerTable, TrainTable

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) over named parameters; weight decay skips biases and norms."""

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], table: OptimizerTable) -> None:
        self._parameters = {name: p for name, p in parameters if p.requires_grad}
        # of a sharded parameter, what this rank has
        self._weights = {name: local(p.detach()) for name, p in self._parameters.items()}
        self._masters = {name: weight.to(torch.float32) for name, weight in self._weights.items()}
        self._names = {id(master): name for name, master in self._masters.items()}
        self.steps = 0
        self._warmup, self._schedule = table.warmup_steps, table.schedule
        self._planned = table.batches * (table.mu * table.minibatches if isinstance(table, TrainTable) else 1)
        decayed = [m for m in self._masters.values() if m.ndim >= 2]
        plain = [m for m in self._masters.values() if m.ndim < 2]
        groups = [
            {"params": members, "decayed": decays} for members, decays in ((decayed, True), (plain, False)) if members
        ]
        self._adam = torch.optim.AdamW(groups, lr=0.0, betas=(table.beta1, table.beta2), weight_decay=0.0)

    def clear(self) -> None:
        """Drop all gradients, those in hand included."""
        for name, parameter in self._parameters.items():
            parameter.grad = None
            self._masters[name].grad = None

    def collect(self) -> None:
        """Move what backward left on the parameters into the gradients in hand; call after each micro-batch."""
        for name, parameter in self._parameters.items():
            master = self._masters[name]
            if parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = local(parameter.grad).to(torch.float32)
            else:
                master.grad += local(parameter.grad)
            parameter.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """The float32 gradients in hand, one for every parameter in the model's order, zeros where none came.

        Every member of a mesh has the same ones, even where (in an MoE) its own tokens never reached some expert.
        """
        for master in self._masters.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        return {name: master.grad for name, master in self._masters.items() if master.grad is not None}

    def clip(self, norm: Tensor, limit: float) -> None:
        """Scale the gradients in hand, whose global norm is `norm`, to one of at most `limit`."""
        scale = limit / (norm + 1e-6)
        if scale < 1.0:
            for gradient in self.gradients().values():
                gradient.mul_(scale)

    def rate(self, lr: float) -> float:
        """Learning rate of the next step: linear warm-up to `lr`, then `lr`, or a fall that ends with the last step."""
        if self.steps < self._warmup:
            return lr * (self.steps + 1) / self._warmup
        if self._schedule == "constant":
            return lr
        return lr * max(0.0, (self._planned - self.steps) / max(1, self._planned - self._warmup))

    def step(self, lr: float, weight_decay: float) -> float:
        """Apply the gradients in hand and drop them; returns the learning rate used."""
        rate = self.rate(lr)
        for group in self._adam.param_groups:
            group["lr"] = rate
            group["weight_decay"] = weight_decay if group["decayed"] else 0.0
        self._adam.step()
        with torch.no_grad():
            for name, weight in self._weights.items():
                if self._masters[name] is not weight:
                    weight.copy_(self._masters[name])
        self.steps += 1
        self.clear()
        return rate

    def step_back(self) -> dict[str, Tensor]:
        """What to add to the weights to undo the last step, weight decay apart; empty before the first one here."""
        found: dict[str, Tensor] = {}
        for group in self._adam.param_groups:
            beta1, beta2 = group["betas"]
            for master in group["params"]:
                state = self._adam.state.get(master)
                if not state or not group["lr"]:
                    continue
                count = float(state["step"])
                mean, square = state["exp_avg"] / (1 - beta1**count), state["exp_avg_sq"] / (1 - beta2**count)
                found[self._names[id(master)]] = group["lr"] * mean / (square.sqrt() + group["eps"])
        return found

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps beside `steps`: "moment/parameter" -> tensor, empty before the first step."""
        found: dict[str, Tensor] = {}
        for name, master in self._masters.items():
            state = self._adam.state.get(master, {})
            found |= {f"{moment}/{name}": state[moment] for moment in _MOMENTS if moment in state}
            if master is not self._weights[name]:
                found[f"master/{name}"] = master.detach()
        return found

    def restore(self, steps: int, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `tensors` gave; KeyError where one is missing."""
        self.steps = steps
        for name, master in self._masters.items():
            if master is not self._weights[name]:
                with torch.no_grad():
                    master.copy_(tensors[f"master/{name}"])
            if steps:
                # AdamW counts its own steps in a tensor for each parameter
                state = {moment: tensors[f"{moment}/{name}"].clone() for moment in _MOMENTS}
                self._adam.state[master] = {"step": torch.tensor(float(steps)), **state}
