"""One rank's part of a model and how it takes part in a step: all axes put together.

A layout leaves the Hugging Face model as it is, but for weights that are cut and layers that are other stages', and
gives the trainer what does not depend on the axes: names and this rank's weights, micro-batches forward and backward,
gradients summed over those ranks that have the same weights, one norm, one set of metrics.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from services.policy.batch import Row
from services.policy.decoder import Decoder, text_model
from services.policy.device import CPU
from services.policy.layouts.compiled import check_compiler, compile_layer
from services.policy.layouts.data import exchange, local, shard
from services.policy.layouts.expert import share_experts
from services.policy.layouts.fit import architecture_of, check_fit
from services.policy.layouts.grid import DATA, Grid
from services.policy.layouts.pipeline import Loss, Pipeline, keep_stage
from services.policy.layouts.tensor import share_embedding, share_layer
from services.policy.packing import MicroBatch, pack, share_out
from services.policy.reduce import sum_in_buckets
from shared.config import Recipe
from shared.mesh import MeshError
from shared.models import ModelError, load_model, load_skeleton
from shared.models.stored import Slice, can_slice, stored_weights
from shared.weights.slices import Box, Parallel, PolicyLayout, Split, held, is_vision, owner, split_of
from shared.weights.staging import Shared, manifest_of

SUM_BYTES = 32 << 20
"""About how many bytes of gradients are summed in one go."""


class Layout:
    """This rank's part of `model`, which comes whole and is cut in place. ModelError for a mix that it cannot have.

    This rank's part alone comes to `device`. A model that has no memory yet, since it is on the meta device, gets it
    there; what that holds is `read`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        grid: Grid | None = None,
        *,
        sequence: bool = False,
        checkpointing: bool = False,
        compiled: bool = False,
        device: torch.device = CPU,
    ) -> None:
        # dropout would make the trainer disagree with the engine about the same tokens
        self.model = model.eval()
        self.grid = grid = grid or Grid.alone()
        check_fit(model.config, grid.parallel)
        self._architecture = architecture_of(model.config)
        self.manifest = manifest_of(model)
        self._specs = {spec.name: spec for spec in self.manifest}
        extra = self._specs.keys() - dict(model.named_parameters()).keys()
        if extra:
            raise ModelError(f"expected a model whose weights are all parameters, got the buffers {sorted(extra)}")
        text: Any = text_model(model)
        config = text.config
        keep_stage(model, text, grid)
        self._cut()
        self.decoder = Decoder(model, grid, sequence=sequence)
        tensor, expert = grid.axis("tp"), grid.axis("ep")
        if grid.first:
            share_embedding(text.embed_tokens, tensor, self._begins(text.embed_tokens, "weight"))
        for layer in text.layers:
            share_layer(layer, tensor, sequence=sequence)
            if hasattr(layer.mlp, "experts"):
                experts = layer.mlp.experts
                share_experts(experts, expert, tensor, self._begins(experts, "gate_up_proj"))
            if compiled:
                compile_layer(layer)
            if checkpointing:
                layer.forward = _checkpointed(layer.forward)
        self._multiple = grid.parallel.cp * grid.parallel.tp if sequence else grid.parallel.cp
        self._merge = int(getattr(getattr(model.config, "vision_config", None), "spatial_merge_size", 1))
        some = next(iter(model.parameters()))
        self._pipeline = Pipeline(
            self.decoder,
            grid,
            split=self._multiple,
            width=int(config.hidden_size),
            dtype=some.dtype,
            device=device,
        )
        shard(text.layers, self.decoder, grid.axis("fsdp"), device)
        self._summed_over = {name: self._sums_of(name, sequence) for name in self.parameters()}
        self._copies = {name: self._copies_of(name) for name in self.parameters()}

    # --- what this rank has -------------------------------------------------------------------------------------------

    def parameters(self) -> dict[str, nn.Parameter]:
        """This rank's parameters by their names in the model, tied ones once, in the model's order."""
        return dict(self.model.named_parameters())

    def weights(self) -> dict[str, Tensor]:
        """This rank's part of each parameter; the memory is the parameter's."""
        return {name: local(p.detach()) for name, p in self.model.named_parameters()}

    def box(self, name: str, rank: int) -> Box | None:
        """Which part of a parameter a rank has; None for an empty one."""
        return held(self._specs[name], self._architecture, self.grid.parallel, rank)

    def owned(self, name: str, rank: int) -> Box | None:
        """The part that a rank has, if it is the one of all ranks with that part to hand it on."""
        box = self.box(name, rank)
        return box if owner(self._specs[name], self._architecture, self.grid.parallel, rank) else None

    @property
    def whole(self) -> bool:
        """Whether this rank has all of the model."""
        return self.grid.parallel.world == 1

    @property
    def shared(self) -> Shared:
        """The weights as the ranks of the replica have them between them."""
        return Shared(self.manifest, PolicyLayout(self._architecture, self.grid.parallel))

    def write(self, name: str, part: Tensor, whole: Tensor) -> None:
        """Copy this rank's part of what belongs to a parameter into the whole of it, if no other rank is to do it."""
        box = self.owned(name, self.grid.rank)
        if box is not None:
            whole[box.within(Box.whole(self._specs[name].shape))].copy_(part)

    def cut(self, name: str, whole: Tensor | Slice) -> Tensor:
        """This rank's part of what belongs to a parameter: of a tensor, or of a file's slice that reads no more."""
        box, spec = self.box(name, self.grid.rank), self._specs[name]
        if box is None:
            return torch.empty_like(self.weights()[name])
        found: Tensor = whole[box.within(Box.whole(spec.shape))]
        return found

    @torch.no_grad()
    def read(self, stored: Mapping[str, Slice]) -> None:
        """Take this rank's part of each weight out of files that have all of them, one after the other."""
        for name, own in self.weights().items():
            own.copy_(self.cut(name, stored[name]))

    def swap(self, weights: Mapping[str, Tensor]) -> None:
        """Exchange this rank's weights with others of their names and shapes, in place; again to undo it."""
        mine = self.weights()
        for name, other in weights.items():
            own = mine[name]
            if other.data_ptr() != own.data_ptr():
                kept = own.clone()
                own.copy_(other)
                other.copy_(kept)

    # --- a step -------------------------------------------------------------------------------------------------------

    def micro_batches(self, rows: Sequence[Row], limit: int) -> list[MicroBatch]:
        """This rank's micro-batches of a step's rows; every rank of the replica has as many."""
        axis = self.grid.axis(*DATA)
        shares = share_out(rows, limit, axis.size)
        expert = self.grid.parallel.ep > 1
        found = []
        for index, own in enumerate(shares[axis.index]):
            # ranks that share experts have lines of one length
            longest = max(sum(row.length for row in share[index]) for share in shares) if expert else 1
            found.append(pack(own, self._multiple, max(1, longest), self._merge))
        return found

    def predict(self, micros: Sequence[MicroBatch]) -> list[Any]:
        """Log-probabilities and entropies of each micro-batch, without gradients; None on all stages but the last."""
        return self._pipeline.predict(micros)

    def train(self, micros: Sequence[MicroBatch], loss: Loss, collect: Callable[[], None]) -> None:
        """Forward and backward of all micro-batches; gradients are those of this rank's samples."""
        self._pipeline.train(micros, loss, collect)

    @property
    def counts(self) -> bool:
        """Whether this rank's losses and metrics count: several ranks have the same ones."""
        return self.grid.last and self.grid.place.cp == 0 and self.grid.place.tp == 0

    def sum_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Sum gradients in place over all ranks that have the same weights and other samples, or other tokens."""
        by_axes: dict[tuple[str, ...], list[Tensor]] = defaultdict(list)
        for name, gradient in gradients.items():
            if self._summed_over[name]:
                by_axes[self._summed_over[name]].append(gradient)
        for axes in sorted(by_axes):
            sum_in_buckets(by_axes[axes], SUM_BYTES, partial(_total, group=self.grid.axis(*axes).group))
        if self._architecture.tied and self.grid.ends is not None:
            for name, gradient in gradients.items():
                if split_of(name, gradient.shape) is Split.VOCABULARY:
                    dist.all_reduce(gradient, group=self.grid.ends)

    def norm(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """The 2-norm of the whole model's gradient, the same on every rank."""
        if self.whole:
            return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients.values()]))
        squares = [
            torch.linalg.vector_norm(gradient).double().square() / self._copies[name]
            for name, gradient in gradients.items()
        ]
        total = torch.stack(squares).sum()
        dist.all_reduce(total)
        return total.sqrt().float()

    def sum_metrics(
        self, sums: Mapping[str, float], maxima: Mapping[str, float]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Sums added up over the replica's ranks, each sample counted once, and the largest of the maxima."""
        if self.whole:
            return dict(sums), dict(maxima)
        added = torch.tensor([float(sums[name]) * self.counts for name in sorted(sums)], dtype=torch.float64)
        peaks = torch.tensor([float(maxima[name]) for name in sorted(maxima)], dtype=torch.float64)
        dist.all_reduce(added)
        if maxima:
            dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
        return dict(zip(sorted(sums), added.tolist(), strict=True)), dict(
            zip(sorted(maxima), peaks.tolist(), strict=True)
        )

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """A MeshError on one rank within is one on all, so that none waits in the next collective for one that left."""
        own: MeshError | None = None
        try:
            yield
        except MeshError as error:
            own = error
        failed = torch.tensor([own is not None], dtype=torch.int32)
        if not self.whole:
            dist.all_reduce(failed)
        if own is not None:
            raise own
        if int(failed):
            raise MeshError(f"{int(failed)} ranks of this replica failed in their groups; their logs say why")

    # --- cutting ------------------------------------------------------------------------------------------------------

    def _cut(self) -> None:
        """Replace each parameter by this rank's part of it, but for what FSDP does."""
        parallel = self.grid.parallel
        if parallel.tp == parallel.ep == 1:
            return
        names = {id(p): name for name, p in self.model.named_parameters()}

        def part(whole: nn.Parameter) -> nn.Parameter:
            box = self._held(names[id(whole)])
            own = whole.detach()[box.within(Box.whole(whole.shape))].clone()
            return nn.Parameter(own, requires_grad=whole.requires_grad)

        exchange(self.model, part)

    def _held(self, name: str) -> Box:
        """What this rank has of a tensor, but for FSDP."""
        parallel = self.grid.parallel
        rank = Parallel(pp=parallel.pp, ep=parallel.ep, tp=parallel.tp)
        place = self.grid.place._replace(replicate=0, fsdp=0, cp=0)
        box = held(self._specs[name], self._architecture, rank, rank.rank_of(place))
        assert box is not None, f"{name} is of another stage"
        return box

    def _begins(self, module: nn.Module, key: str) -> int:
        """Where this rank's part of a weight begins along its first dimension."""
        name = next(name for name, p in self.model.named_parameters() if p is getattr(module, key))
        return self._held(name).start[0]

    def _sums_of(self, name: str, sequence: bool) -> tuple[str, ...]:
        """The axes over which a parameter's gradients are summed after backward; FSDP sums over its own."""
        axes = {"replicate", "ep", "cp"}
        split = split_of(name, self._specs[name].shape)
        if split is Split.EXPERTS:
            axes.remove("ep")  # they had the tokens of all ranks of the axis
        elif split is Split.WHOLE and not is_vision(name):
            heads = "q_norm" in name or "k_norm" in name  # of which each rank has some
            tokens = sequence and ".mlp." not in name  # between attention and MLP each rank has some; a router has all
            if heads or tokens:
                axes.add("tp")
        return tuple(sorted(axis for axis in axes if self.grid.axis(axis).group is not None))

    def _copies_of(self, name: str) -> int:
        """How many ranks of the replica have each element that this rank has of a parameter."""
        parallel = self.grid.parallel
        boxes = [held(self._specs[name], self._architecture, parallel, rank) for rank in range(parallel.world)]
        return max(1, boxes.count(boxes[self.grid.rank]))


def layout_of(model: PreTrainedModel, recipe: Recipe, grid: Grid | None = None, device: torch.device = CPU) -> Layout:
    """The layout that the recipe's [policy] asks for, of a model that is whole or without memory."""
    policy = recipe.policy
    if policy.compile:
        check_compiler()
    return Layout(
        model,
        grid,
        sequence=policy.parallel.sequence,
        checkpointing=policy.gradient_checkpointing,
        compiled=policy.compile,
        device=device,
    )


def load_layout(recipe: Recipe, grid: Grid | None = None, device: torch.device = CPU, *, weights: bool) -> Layout:
    """The model of the recipe in the recipe's layout; `weights` false: its weights have arbitrary values.

    Of a model in files each rank reads its part alone. A model that is drawn from a seed, or that only transformers can
    read, is there whole before it is cut.
    """
    model = recipe.model
    if not can_slice(model):
        return layout_of(load_model(model, recipe.run.seed, weights=weights), recipe, grid, device)
    skeleton = load_skeleton(model)
    stored = stored_weights(model, skeleton) if weights else {}
    layout = layout_of(skeleton, recipe, grid, device)
    if weights:
        layout.read(stored)
    return layout


def _checkpointed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Forward that keeps its input alone and is computed again in backward (Chen et al., arXiv 1604.06174)."""

    def run(hidden: Tensor, **rest: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(hidden, **rest)
        found: Tensor = checkpoint(forward, hidden, use_reentrant=False, preserve_rng_state=False, **rest)
        return found

    return run


def _total(flat: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    dist.all_reduce(flat, group=group)
    return flat
