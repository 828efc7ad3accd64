"""Pipeline parallelism: each stage has some layers; micro-batches pass forward and backward by turns (1F1B).

Narayanan et al., "Efficient large-scale language model training" (arXiv 2104.04473), section 2.2: a stage begins with
as many micro-batches as there are stages behind it, then goes back and forth, so that it never holds more than that.
Our own small loop rather than torch's: all ranks know all micro-batches, so each may have another length, and nobody
has to tell shapes. With one stage it is a plain loop over micro-batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from services.policy.layouts.grid import Grid
from services.policy.packing import MicroBatch
from shared.weights.slices import stage_layers

Forward = Callable[[MicroBatch, Tensor | None], Any]
"""Hidden states from hidden states, or on the last stage what the model says of the micro-batch."""
Loss = Callable[[int, Any], Tensor]
"""The loss of a micro-batch by its index and what the model says of it."""


def keep_stage(model: Any, text: Any, grid: Grid) -> None:
    """Drop the layers of other stages; those that stay keep their names."""
    if grid.parallel.pp == 1:
        return
    own = stage_layers(len(text.layers), grid.parallel.pp, grid.place.pp)
    for index in range(len(text.layers)):
        if index not in own:
            del text.layers._modules[str(index)]
    tied = model.get_output_embeddings().weight is text.embed_tokens.weight
    if not grid.first:
        if not (tied and grid.last):  # the last stage's head is the embedding
            text.embed_tokens = None
        if hasattr(model.model, "visual"):
            model.model.visual = None
    if not grid.last:
        text.norm = None
        if not tied or not grid.first:
            model.lm_head = None


@dataclass(frozen=True)
class _Held:
    """A micro-batch between its forward and its backward: what came in, what went out, and the way that it is on."""

    entered: Tensor | None
    output: Tensor
    sending: _Sending | None


class _Sending:
    """A tensor on its way to another stage; it must be waited for, since a send that is forgotten is given up."""

    def __init__(self, value: Tensor, to: int, group: ProcessGroup | None) -> None:
        self._value = value.contiguous()
        self._work = dist.isend(self._value, dst=to, group=group)

    def wait(self) -> None:
        """Until it has been received."""
        if self._work is not None:
            self._work.wait()


class Pipeline:
    """Runs micro-batches through this rank's stage.

    `split` is into how many parts a line is cut among ranks; `width` and `dtype` are those of hidden states.
    """

    def __init__(
        self, forward: nn.Module, grid: Grid, *, split: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._forward: Forward = forward
        self._grid, self._split = grid, split
        self._on, self._back = grid.axis("pp").group, grid.back
        self._width, self._dtype, self._device = width, dtype, device

    def predict(self, micros: Sequence[MicroBatch]) -> list[Any]:
        """What the model says of each micro-batch, without gradients; None for each before the last stage."""
        found = []
        sending: _Sending | None = None
        with torch.no_grad():
            for micro in micros:
                output = self._forward(micro, self._received(micro))
                found.append(output if self._grid.last else None)
                if sending is not None:
                    sending.wait()
                sending = self._send(output)
        if sending is not None:
            sending.wait()
        return found

    def train(self, micros: Sequence[MicroBatch], loss: Loss, collect: Callable[[], None]) -> None:
        """Forward and backward of all micro-batches; `collect` is called after each backward."""
        behind = self._grid.parallel.pp - 1 - self._grid.place.pp
        held = deque(self._one_forward(index, micro, loss) for index, micro in enumerate(micros[:behind]))
        returning: _Sending | None = None
        for index, micro in enumerate(micros):
            if index + behind < len(micros):
                held.append(self._one_forward(index + behind, micros[index + behind], loss))
            gradient = self._one_backward(micro, held.popleft())
            collect()
            if returning is not None:
                returning.wait()
            returning = None if gradient is None else _Sending(gradient, self._grid.neighbour(-1), self._back)
        if returning is not None:
            returning.wait()

    def _one_forward(self, index: int, micro: MicroBatch, loss: Loss) -> _Held:
        entered = self._received(micro)
        if entered is not None:
            entered.requires_grad_()
        output = self._forward(micro, entered)
        if self._grid.last:
            return _Held(entered, loss(index, output), None)
        return _Held(entered, output, self._send(output.detach()))

    def _one_backward(self, micro: MicroBatch, held: _Held) -> Tensor | None:
        """The gradient of what came in, if anything did."""
        if held.sending is None:
            held.output.backward()
        else:
            gradient = self._room(micro)
            dist.recv(gradient, src=self._grid.neighbour(1), group=self._back)
            held.sending.wait()  # which is over: the next stage has computed with it
            held.output.backward(gradient)
        return held.entered.grad if held.entered is not None else None

    def _received(self, micro: MicroBatch) -> Tensor | None:
        if self._grid.first:
            return None
        hidden = self._room(micro)
        dist.recv(hidden, src=self._grid.neighbour(-1), group=self._on)
        return hidden

    def _send(self, hidden: Any) -> _Sending | None:
        return None if self._grid.last else _Sending(hidden, self._grid.neighbour(1), self._on)

    def _room(self, micro: MicroBatch) -> Tensor:
        return torch.empty((1, micro.size // self._split, self._width), dtype=self._dtype, device=self._device)
