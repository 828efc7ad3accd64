"""Which blocks of each tensor a rank of an engine takes, by the tensor's name in the policy's model.

Read off the sources of vLLM 0.32.0 and SGLang 0.5.23; both number ranks along tp first. A rank takes what its stage
computes with: neither engine's copies of embedding, head or vision tower on stages that never use them are fed.

    q; gate, up           tp even shares of dim 0, q by heads
    k, v                  by heads; where tp exceeds them, tp / kv_heads neighbours have the same one
    o, down               tp even shares of dim 1
    embed_tokens, lm_head tp even shares of the rows padded to 64 (vLLM and SGLang's VocabParallelEmbedding; SGLang
                          pads to 64 x tp where tp does not divide that), of which only real rows travel
    experts               with ep: whole experts, neighbours on a rank; else each expert's gate, up and down over tp
    vision tower          over tp, as both engines do by default (`mm_encoder_tp_mode` and `mm_enable_dp_encoder`
                          left alone): attn.qkv by heads within each of q, k and v; mlp.gate, mlp.up and merger.mlp.0
                          by rows; attn.proj, mlp.down and merger.mlp.2 by columns; SGLang pads the width of its
                          mlp to 8; patch_embed and norms whole

Both fuse qkv and gate/up, which changes where rows lie in a rank's memory, not which ones it has.
"""

from __future__ import annotations

from dataclasses import dataclass

from shared.config.schema import EngineName
from shared.weights.slices import Architecture, Box, Spec, Split, is_vision, on_stage, split_of

VOCABULARY_PADDING = 64
SGLANG_VISION_PADDING = 8
VISION_COLUMNS = ("mlp.gate_proj", "mlp.up_proj", "mlp.0")
VISION_ROWS = ("attn.proj", "mlp.down_proj", "mlp.2")


@dataclass(frozen=True, slots=True)
class EngineParallel:
    """Sizes of an engine's axes; its ranks are pp x tp, and with `ep` = tp these share out whole experts."""

    tp: int = 1
    pp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        if min(self.tp, self.pp, self.ep) < 1 or self.ep not in (1, self.tp):
            raise ValueError(f"expected sizes of at least 1, and ep of 1 or of tp, got {self}; set ep to 1 or to tp")

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.tp * self.pp


@dataclass(frozen=True, slots=True)
class EngineLayout:
    """An engine, and how it spreads a model over its ranks."""

    engine: EngineName
    parallel: EngineParallel = EngineParallel()


def engine_layers(engine: EngineName, layers: int, pp: int, stage: int) -> range:
    """The layers of a pipeline stage of an engine: `get_pp_indices` of either, without a partition set by hand.

    What is over after an even share goes one each to the last stages; in vLLM the very last one gets none of it.
    """
    even, extra = divmod(layers, pp)
    longer = pp - extra - (engine == "vllm")  # the first stage with one more

    def start(stage: int) -> int:
        return even * stage + min(max(stage - longer, 0), extra)

    return range(start(stage), start(stage + 1))


def engine_held(
    spec: Spec, architecture: Architecture, engine: EngineName, parallel: EngineParallel, rank: int
) -> list[Box]:
    """The boxes of the tensor that this rank takes, none of them empty; [] for another stage's tensor."""
    check_engine(architecture, engine, parallel)
    if not 0 <= rank < parallel.world:
        raise ValueError(f"expected a rank from 0 to {parallel.world - 1} of {parallel}, got {rank}")
    stage, place = divmod(rank, parallel.tp)
    layers = engine_layers(engine, architecture.layers, parallel.pp, stage)
    if not on_stage(spec.name, architecture.tied, layers, stage, parallel.pp):
        return []
    if parallel.tp == 1:
        return [Box.whole(spec.shape)] if Box.whole(spec.shape).numel else []
    boxes = _vision if is_vision(spec.name) else _language
    return [box for box in boxes(spec, architecture, engine, parallel, place) if box.numel]


def check_engine(architecture: Architecture, engine: EngineName, parallel: EngineParallel) -> None:
    """ValueError for a layout that the engine does not have for the model."""
    if engine == "transformers" and parallel.world > 1:
        raise ValueError(f"expected one rank of the engine transformers, got {parallel}; set tp and pp to 1")
    heads, kv_heads, tp = architecture.heads, architecture.kv_heads, parallel.tp
    if heads % tp or (kv_heads % tp and tp % kv_heads):
        raise ValueError(
            f"expected {engine}'s tp to divide the {heads} heads, and to divide or be a multiple of the {kv_heads} "
            f"key/value heads, got tp = {tp}; choose such a tp"
        )
    if parallel.pp > architecture.layers:
        raise ValueError(
            f"expected at most a stage a layer in {engine}, got pp = {parallel.pp} for {architecture.layers} layers; "
            f"lower pp"
        )
    if engine == "sglang" and architecture.experts % parallel.ep:
        raise ValueError(
            f"expected sglang's ep to divide the {architecture.experts} experts, got ep = {parallel.ep}; set ep to 1"
        )


def _language(
    spec: Spec, architecture: Architecture, engine: EngineName, parallel: EngineParallel, place: int
) -> list[Box]:
    """The boxes of a tensor of the language model for the rank at `place` of tp."""
    whole, tp = Box.whole(spec.shape), parallel.tp
    split = split_of(spec.name, spec.shape)
    if split is Split.COLUMN and (".k_proj." in spec.name or ".v_proj." in spec.name):
        rows = spec.shape[0] // architecture.kv_heads
        first = architecture.kv_heads * place // tp
        return [whole.cut(0, first * rows, (first + max(1, architecture.kv_heads // tp)) * rows)]
    if split is Split.COLUMN:
        return [whole.cut(0, *_share(spec, 0, tp, place))]
    if split is Split.ROW:
        return [whole.cut(1, *_share(spec, 1, tp, place))]
    if split is Split.VOCABULARY:
        padding = VOCABULARY_PADDING
        if engine == "sglang" and _padded(spec.shape[0], padding) % tp:
            padding *= tp
        return [whole.cut(0, *_share(spec, 0, tp, place, padding))]
    if split is Split.EXPERTS:
        return _experts(spec, parallel, place)
    return [whole]


def _experts(spec: Spec, parallel: EngineParallel, place: int) -> list[Box]:
    """The boxes of stacked experts: gate_up_proj [E, 2I, H], the gate's I rows first, or down_proj [E, H, I]."""
    whole = Box.whole(spec.shape)
    if parallel.ep > 1:
        # vLLM's "linear" placement: the first ranks have one more
        each, extra = divmod(spec.shape[0], parallel.ep)
        first = place * each + min(place, extra)
        return [whole.cut(0, first, first + each + (place < extra))]
    if spec.name.endswith("down_proj"):
        return [whole.cut(2, *_share(spec, 2, parallel.tp, place))]
    return _blocks(spec, 1, 2, parallel.tp, place)


def _vision(
    spec: Spec, architecture: Architecture, engine: EngineName, parallel: EngineParallel, place: int
) -> list[Box]:
    """The boxes of a tensor of Qwen2.5-VL's vision tower for the rank at `place` of tp."""
    whole = Box.whole(spec.shape)
    *path, leaf = spec.name.split(".")
    module = ".".join(path[-2:])
    padding = SGLANG_VISION_PADDING if engine == "sglang" and ".blocks." in spec.name and path[-2] == "mlp" else 1
    if module == "attn.qkv":
        return _blocks(spec, 0, 3, parallel.tp, place)
    if module in VISION_COLUMNS:
        return [whole.cut(0, *_share(spec, 0, parallel.tp, place, padding))]
    if module in VISION_ROWS and leaf == "weight":
        return [whole.cut(1, *_share(spec, 1, parallel.tp, place, padding))]
    return [whole]


def _blocks(spec: Spec, dim: int, blocks: int, tp: int, place: int) -> list[Box]:
    """A share of each of the equal blocks that lie one after the other along `dim`."""
    size = spec.shape[dim] // blocks
    whole = Box.whole(spec.shape)
    return [
        block.cut(dim, *_even(spec, size, size, tp, place))
        for block in (whole.cut(dim, size * i, size * (i + 1)) for i in range(blocks))
    ]


def _share(spec: Spec, dim: int, tp: int, place: int, padding: int = 1) -> tuple[int, int]:
    """The real ones among an even share of `dim`, padded to a multiple of `padding`."""
    return _even(spec, spec.shape[dim], _padded(spec.shape[dim], padding), tp, place)


def _even(spec: Spec, size: int, padded: int, tp: int, place: int) -> tuple[int, int]:
    if padded % tp:
        raise ValueError(
            f"expected the engine's tp to divide the {padded} rows or columns of {spec.name} {list(spec.shape)}, "
            f"got tp = {tp}; choose a divisor"
        )
    step = padded // tp
    return min(step * place, size), min(step * (place + 1), size)


def _padded(size: int, padding: int) -> int:
    return -(-size // padding) * padding
