"""Plans of transfers: owners tile the model, and engines get each element that they take once, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import NamedTuple, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.config.schema import EngineName
from shared.weights import digest_of, manifest_of
from shared.weights.digest import box_sum, hexadecimal
from shared.weights.engine_slices import EngineLayout, EngineParallel, engine_held, engine_layers
from shared.weights.plan import gather, plan
from shared.weights.slices import (
    Architecture,
    Box,
    Coordinates,
    Parallel,
    Split,
    chunk,
    held,
    owner,
    part,
    runs,
    split_of,
    stage_layers,
)
from tests.engines.families import FAMILIES, tiny


class Spec(NamedTuple):
    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Model:
    """Sizes of a model of one of the families; `inner` is the width of the MLP or of an expert."""

    family: str
    architecture: Architecture
    head_dim: int = 2
    hidden: int = 6
    inner: int = 8
    vocabulary: int = 70
    vision_hidden: int = 8
    vision_inner: int = 12
    depth: int = 1
    patch: tuple[int, ...] = (1, 1, 2, 2)

    def manifest(self) -> list[Spec]:
        return [Spec(name, shape) for name, shape in self._tensors()]

    def _tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        base = "model."
        if self.family == "qwen2_5_vl":
            yield from self._vision()
            base = "model.language_model."
        yield f"{base}embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.architecture.layers):
            yield from self._layer(f"{base}layers.{layer}.")
        yield f"{base}norm.weight", (self.hidden,)
        if not self.architecture.tied:
            yield "lm_head.weight", (self.vocabulary, self.hidden)

    def _layer(self, base: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        hidden, inner, experts = self.hidden, self.inner, self.architecture.experts
        q, kv = self.architecture.heads * self.head_dim, self.architecture.kv_heads * self.head_dim
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            yield f"{base}self_attn.{name}_proj.weight", (rows, hidden)
            if self.family in ("qwen2", "qwen2_5_vl"):
                yield f"{base}self_attn.{name}_proj.bias", (rows,)
        yield f"{base}self_attn.o_proj.weight", (hidden, q)
        if self.family in ("qwen3", "qwen3_moe"):
            yield f"{base}self_attn.q_norm.weight", (self.head_dim,)
            yield f"{base}self_attn.k_norm.weight", (self.head_dim,)
        if experts:
            yield f"{base}mlp.experts.gate_up_proj", (experts, 2 * inner, hidden)
            yield f"{base}mlp.experts.down_proj", (experts, hidden, inner)
            yield f"{base}mlp.gate.weight", (experts, hidden)
        else:
            yield f"{base}mlp.gate_proj.weight", (inner, hidden)
            yield f"{base}mlp.up_proj.weight", (inner, hidden)
            yield f"{base}mlp.down_proj.weight", (hidden, inner)
        yield f"{base}input_layernorm.weight", (hidden,)
        yield f"{base}post_attention_layernorm.weight", (hidden,)

    def _vision(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        hidden, inner, merged = self.vision_hidden, self.vision_inner, 4 * self.vision_hidden
        yield "model.visual.patch_embed.proj.weight", (hidden, *self.patch)
        for block in range(self.depth):
            base = f"model.visual.blocks.{block}."
            sizes = {
                "attn.qkv": (3 * hidden, hidden),
                "attn.proj": (hidden, hidden),
                "mlp.gate_proj": (inner, hidden),
                "mlp.up_proj": (inner, hidden),
                "mlp.down_proj": (hidden, inner),
            }
            for norm in ("norm1", "norm2"):
                yield f"{base}{norm}.weight", (hidden,)
            for module, shape in sizes.items():
                yield f"{base}{module}.weight", shape
                yield f"{base}{module}.bias", shape[:1]
        yield "model.visual.merger.ln_q.weight", (hidden,)
        for module, shape in {"0": (merged, merged), "2": (self.hidden, merged)}.items():
            yield f"model.visual.merger.mlp.{module}.weight", shape
            yield f"model.visual.merger.mlp.{module}.bias", shape[:1]


DENSE = Architecture(layers=2, heads=4, kv_heads=2, experts=0, tied=False)


def generated_model(rng: Random, *, even: int = 1, least_kv: int = 1) -> Model:
    """Any family; widths are multiples of `even`, heads such that an engine's tp of it fits."""
    family = rng.choice(FAMILIES)
    kv_heads = rng.choice([n for n in (1, 2, 3, 4, 6) if n >= least_kv and (n % even == 0 or even % n == 0)])
    heads = rng.choice([n for n in range(kv_heads, 25, kv_heads) if n % even == 0])
    experts = rng.choice([4, 6, 8, 12]) if family == "qwen3_moe" else 0
    return Model(
        family,
        Architecture(rng.randint(1, 4), heads, kv_heads, experts, rng.random() < 0.5),
        head_dim=rng.choice([2, 4]),
        hidden=rng.randint(1, 7),
        inner=even * rng.randint(1, 5),
        vocabulary=rng.randint(1, 200),
        vision_hidden=even * rng.randint(1, 3),
        vision_inner=even * 8 * rng.randint(1, 2) - rng.choice([0, 0, even]),
    )


def generated_policy(rng: Random, model: Model, world: int = 24) -> Parallel:
    """A layout that cuts the model, of at most `world` ranks."""
    known = model.architecture
    while True:
        tp = rng.choice([n for n in (1, 2, 3, 4, 6) if known.kv_heads % n == 0])
        ep = rng.choice([n for n in (1, 2, 3, 4) if known.experts % (n * tp) == 0] or [0])
        sizes = Coordinates(
            rng.randint(1, known.layers), rng.randint(1, 2), rng.randint(1, 5), ep, rng.randint(1, 2), tp
        )
        if ep and np.prod(sizes) <= world:
            return Parallel(*sizes)


def generated_pair(seed: int) -> tuple[Model, Parallel, EngineLayout]:
    """A model, a policy's layout and an engine's layout, which suit one another."""
    rng = Random(seed)
    engine: EngineName = rng.choice(get_args(EngineName))
    tp = 1 if engine == "transformers" else rng.choice([1, 2, 2, 4, 3 if engine == "sglang" else 8])
    model = generated_model(rng, even=tp)
    experts = model.architecture.experts
    ep = tp if experts and (engine == "vllm" or experts % tp == 0) and rng.random() < 0.5 else 1
    pp = 1 if engine == "transformers" else rng.randint(1, model.architecture.layers)
    if engine == "sglang" and (-(-model.vision_inner // 8) * 8) % tp:
        return generated_pair(seed + 1_000_000)
    return model, generated_policy(rng, model), EngineLayout(engine, EngineParallel(tp, pp, ep))


def index(box: Box) -> tuple[slice, ...]:
    """The box in the whole tensor."""
    return box.within(Box.whole(box.start))


# --- boxes ---


def test_a_box_knows_its_shape_its_overlap_and_its_place_within_another() -> None:
    box, other = Box((2, 0), (6, 5)), Box((4, 3), (9, 9))
    assert (box.shape, box.numel) == ((4, 5), 20)
    common = box.intersect(other)
    assert common == other.intersect(box) == Box((4, 3), (6, 5))
    assert common.within(box) == (slice(2, 4), slice(3, 5))
    assert common.within(other) == (slice(0, 2), slice(0, 2))
    assert box.intersect(Box((6, 0), (7, 5))) is None
    assert Box.whole([3, 4]) == Box((0, 0), (3, 4))


def test_a_scalar_is_one_element() -> None:
    scalar = Box.whole(())
    assert (scalar.numel, scalar.intersect(scalar), scalar.within(scalar)) == (1, scalar, ())
    assert list(runs(scalar, ())) == [(0, 1)]


boxes = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 3), st.integers(0, 2)), max_size=4)


@given(boxes)
def test_runs_are_the_elements_of_a_box_in_order_and_as_long_as_can_be(dims: list[tuple[int, int, int]]) -> None:
    shape = [before + size + after for before, size, after in dims]
    box = Box(tuple(d[0] for d in dims), tuple(d[0] + d[1] for d in dims))
    flat = np.arange(np.prod(shape, dtype=int)).reshape(shape)[index(box)].reshape(-1)
    found = list(runs(box, shape))
    assert [i for start, stop in found for i in range(start, stop)] == flat.tolist()
    assert len({stop - start for start, stop in found}) == 1
    assert all(stop < start for (_, stop), (start, _) in zip(found, found[1:], strict=False))


# --- shares and layouts ---


@given(st.integers(0, 300), st.integers(1, 40))
def test_parts_and_chunks_tile_what_they_share(size: int, ways: int) -> None:
    for share in (part, chunk):
        cuts = [share(size, ways, i) for i in range(ways)]
        assert [i for start, stop in cuts for i in range(start, stop)] == list(range(size))
    assert {stop - start for start, stop in (part(size, ways, i) for i in range(ways))} <= {
        size // ways,
        -(-size // ways),
    }


@given(st.integers(1, 300), st.integers(1, 40))
def test_chunks_are_those_of_torch(size: int, ways: int) -> None:
    own = [chunk(size, ways, i) for i in range(ways)]
    theirs = [len(piece) for piece in torch.empty(size).chunk(ways)]
    assert [stop - start for start, stop in own] == theirs + [0] * (ways - len(theirs))


@given(st.tuples(*[st.integers(1, 4)] * 6))
def test_ranks_are_coordinates_and_back_with_tp_the_fastest(axes: tuple[int, ...]) -> None:
    parallel = Parallel(*axes)
    places = [parallel.coordinates(rank) for rank in range(parallel.world)]
    assert [parallel.rank_of(place) for place in places] == list(range(parallel.world))
    assert places == sorted(places)  # pp, replicate, fsdp, ep, cp, tp
    assert len(set(places)) == parallel.world == np.prod(axes)


@given(st.integers(1, 60), st.data())
def test_stages_share_the_layers_in_order(layers: int, data: st.DataObject) -> None:
    pp = data.draw(st.integers(1, layers))
    for cut in (
        [stage_layers(layers, pp, stage) for stage in range(pp)],
        [engine_layers("vllm", layers, pp, stage) for stage in range(pp)],
        [engine_layers("sglang", layers, pp, stage) for stage in range(pp)],
    ):
        assert [layer for stage in cut for layer in stage] == list(range(layers))
        assert {len(stage) for stage in cut} <= {layers // pp, layers // pp + 1}


# --- names ---


@pytest.mark.parametrize("family", FAMILIES)
def test_manifests_of_these_tests_are_those_of_transformers(family: str) -> None:
    vision = {"vision_hidden": 64, "vision_inner": 96, "depth": 2, "patch": (3, 2, 14, 14)}
    architecture = Architecture(2, 2, 1, 4 if family == "qwen3_moe" else 0, family not in ("qwen3_moe", "llama"))
    inner = 32 if family == "qwen3_moe" else 96
    vocabulary = 52 if family == "qwen2_5_vl" else 48
    model = Model(family, architecture, 32, 64, inner, vocabulary, **vision)  # type: ignore[arg-type]
    own = {spec.name: spec.shape for spec in model.manifest()}
    assert own == {spec.name: tuple(spec.shape) for spec in manifest_of(tiny(family))}


@pytest.mark.parametrize("base", ["model.layers.11.", "model.language_model.layers.0."])
def test_how_a_tensor_is_cut_follows_from_its_name(base: str) -> None:
    for name in ("q_proj", "k_proj", "v_proj"):
        assert split_of(f"{base}self_attn.{name}.weight", [8, 4]) is Split.COLUMN
        assert split_of(f"{base}self_attn.{name}.bias", [8]) is Split.COLUMN
    assert split_of(f"{base}self_attn.o_proj.weight", [4, 8]) is Split.ROW
    assert split_of(f"{base}self_attn.o_proj.bias", [4]) is Split.WHOLE
    assert split_of(f"{base}self_attn.q_norm.weight", [4]) is Split.WHOLE
    assert split_of(f"{base}mlp.up_proj.weight", [8, 4]) is Split.COLUMN
    assert split_of(f"{base}mlp.down_proj.weight", [4, 8]) is Split.ROW
    assert split_of(f"{base}mlp.experts.gate_up_proj", [4, 8, 4]) is Split.EXPERTS
    assert split_of(f"{base}mlp.experts.down_proj", [4, 4, 4]) is Split.EXPERTS
    assert split_of(f"{base}mlp.gate.weight", [4, 4]) is Split.WHOLE
    assert split_of(f"{base}input_layernorm.weight", [4]) is Split.WHOLE


def test_the_rest_is_vocabulary_or_whole() -> None:
    assert split_of("lm_head.weight", [9, 4]) is Split.VOCABULARY
    assert split_of("model.language_model.embed_tokens.weight", [9, 4]) is Split.VOCABULARY
    assert split_of("model.visual.blocks.0.mlp.gate_proj.weight", [8, 4]) is Split.WHOLE
    assert split_of("model.norm.weight", [4]) is Split.WHOLE
    assert split_of("scale", []) is Split.WHOLE


# --- what a rank of the policy holds ---


@pytest.mark.parametrize("seed", range(150))
def test_owners_tile_every_tensor_and_every_rank_holds_a_copy_of_theirs(seed: int) -> None:
    rng = Random(seed)
    model = generated_model(rng)
    manifest = [*model.manifest(), Spec("model.rotary.scale", ()), Spec("model.empty", (0, 3))]
    known, parallel = model.architecture, generated_policy(rng, model)
    counts = {spec.name: np.zeros(spec.shape, int) for spec in manifest}
    for rank, name, box in gather(manifest, known, parallel):
        counts[name][index(box)] += 1
        [spec] = [spec for spec in manifest if spec.name == name]
        assert held(spec, known, parallel, rank) == box
        assert owner(spec, known, parallel, rank)
    assert all((count == 1).all() for count in counts.values())
    owned = {(name, box) for _, name, box in gather(manifest, known, parallel)}
    for spec in manifest:
        for rank in range(parallel.world):
            holds = held(spec, known, parallel, rank)
            assert holds is None or (spec.name, holds) in owned


def test_row_parallel_weights_are_cut_by_columns_and_then_by_rows_over_fsdp() -> None:
    parallel = Parallel(fsdp=2, tp=2)
    spec = Spec("model.layers.0.self_attn.o_proj.weight", (5, 8))
    cuts = [held(spec, DENSE, parallel, rank) for rank in range(4)]
    assert cuts == [Box((0, 0), (3, 4)), Box((0, 4), (3, 8)), Box((3, 0), (5, 4)), Box((3, 4), (5, 8))]


def test_experts_are_shared_out_over_ep_and_tp_together_and_repeat_over_cp_alone() -> None:
    moe = Architecture(1, 4, 2, 8, False)
    parallel = Parallel(ep=2, cp=2, tp=2)
    spec = Spec("model.layers.0.mlp.experts.gate_up_proj", (8, 6, 4))
    for rank in range(8):
        at = parallel.coordinates(rank)
        first = 2 * (2 * at.ep + at.tp)
        assert held(spec, moe, parallel, rank) == Box((first, 0, 0), (first + 2, 6, 4))
        assert owner(spec, moe, parallel, rank) == (at.cp == 0)


def test_a_short_tensor_leaves_the_last_ranks_of_fsdp_with_nothing() -> None:
    spec, parallel = Spec("model.norm.weight", (5,)), Parallel(fsdp=4)
    cuts = [held(spec, DENSE, parallel, rank) for rank in range(4)]
    assert cuts == [Box((0,), (2,)), Box((2,), (4,)), Box((4,), (5,)), None]
    assert not owner(spec, DENSE, parallel, 3)


@pytest.mark.parametrize("tied", [True, False])
def test_the_ends_of_the_model_are_on_the_first_and_the_last_stage(tied: bool) -> None:
    known, parallel = Architecture(3, 4, 2, 0, tied), Parallel(pp=3)

    def stages(name: str) -> list[int]:
        return [rank for rank in range(3) if held(Spec(name, (4, 4)), known, parallel, rank)]

    embedding = Spec("model.embed_tokens.weight", (4, 4))
    assert stages(embedding.name) == ([0, 2] if tied else [0])
    assert [owner(embedding, known, parallel, rank) for rank in range(3)] == [True, False, False]
    assert stages("model.visual.merger.ln_q.weight") == [0]
    assert stages("model.layers.1.post_attention_layernorm.weight") == [1]
    assert stages("model.language_model.norm.weight") == stages("lm_head.weight") == [2]


# --- what a rank of an engine takes ---


def tp(size: int) -> EngineParallel:
    return EngineParallel(tp=size)


def taken(
    name: str, shape: tuple[int, ...], known: Architecture, engine: EngineName, parallel: EngineParallel
) -> list[list[Box]]:
    return [engine_held(Spec(name, shape), known, engine, parallel, rank) for rank in range(parallel.world)]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_an_engine_repeats_key_value_heads_where_it_has_more_ranks(engine: EngineName) -> None:
    known, name = Architecture(1, 8, 2, 0, False), "model.layers.0.self_attn.k_proj.weight"
    by_tp = {
        tp: [boxes[0].start[0] for boxes in taken(name, (12, 4), known, engine, EngineParallel(tp))] for tp in (1, 2, 4)
    }
    assert by_tp == {1: [0], 2: [0, 6], 4: [0, 0, 6, 6]}
    assert {boxes[0].shape for boxes in taken(name, (12, 4), known, engine, EngineParallel(4))} == {(6, 4)}


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_of_a_padded_vocabulary_only_real_rows_travel(engine: EngineName) -> None:
    rows = [[box.shape[0] for box in boxes] for boxes in taken("lm_head.weight", (100, 4), DENSE, engine, tp(4))]
    assert rows == [[32], [32], [32], [4]]
    # 48 rows are padded to 64, of which the last rank has none that is real
    assert taken("lm_head.weight", (48, 4), DENSE, engine, tp(4))[3] == []


def test_sglang_alone_pads_a_vocabulary_further_for_an_odd_tp() -> None:
    three = Architecture(1, 3, 3, 0, False)
    rows = [[box.shape[0] for box in boxes] for boxes in taken("lm_head.weight", (100, 4), three, "sglang", tp(3))]
    assert rows == [[64], [36], []]
    with pytest.raises(ValueError, match=r"tp to divide the 128 rows .* got tp = 3"):
        taken("lm_head.weight", (100, 4), three, "vllm", tp(3))


def test_experts_are_whole_with_ep_and_cut_inside_without() -> None:
    moe, stack = Architecture(1, 4, 2, 5, False), "model.layers.0.mlp.experts."
    with_ep = taken(f"{stack}gate_up_proj", (5, 8, 3), moe, "vllm", EngineParallel(tp=4, ep=4))
    assert [(box.start[0], box.stop[0]) for [box] in with_ep] == [(0, 2), (2, 3), (3, 4), (4, 5)]
    gate_up = taken(f"{stack}gate_up_proj", (5, 8, 3), moe, "sglang", tp(2))
    assert gate_up[1] == [Box((0, 2, 0), (5, 4, 3)), Box((0, 6, 0), (5, 8, 3))]
    assert taken(f"{stack}down_proj", (5, 3, 4), moe, "sglang", tp(2))[1] == [Box((0, 0, 2), (5, 3, 4))]


def test_the_vision_tower_is_cut_by_heads_and_sglang_pads_its_width() -> None:
    block = "model.visual.blocks.0."
    [first, last] = taken(f"{block}attn.qkv.bias", (24,), DENSE, "vllm", tp(2))
    assert [(box.start[0], box.stop[0]) for box in first] == [(0, 4), (8, 12), (16, 20)]
    assert [(box.start[0], box.stop[0]) for box in last] == [(4, 8), (12, 16), (20, 24)]
    assert taken(f"{block}attn.proj.weight", (4, 8), DENSE, "vllm", tp(2))[1] == [Box((0, 4), (4, 8))]
    widths = {
        engine: [box.shape[1] for [box] in taken(f"{block}mlp.down_proj.weight", (4, 3420), DENSE, engine, tp(4))]
        for engine in ("vllm", "sglang")
    }
    assert widths == {"vllm": [855] * 4, "sglang": [856, 856, 856, 852]}
    assert taken("model.visual.patch_embed.proj.weight", (4, 3, 2, 2, 2), DENSE, "vllm", tp(2))[1][0].shape[0] == 4
    assert taken(f"{block}attn.proj.bias", (4,), DENSE, "vllm", tp(2))[1] == [Box.whole([4])]


@pytest.mark.parametrize(
    ("layers", "pp", "vllm", "sglang"),
    [
        (8, 4, [2, 2, 2, 2], [2, 2, 2, 2]),
        (7, 4, [2, 2, 2, 1], [1, 2, 2, 2]),
        (5, 4, [1, 1, 2, 1], [1, 1, 1, 2]),
        (61, 4, [15, 15, 16, 15], [15, 15, 15, 16]),
        (3, 2, [2, 1], [1, 2]),
    ],
)
def test_engines_share_out_what_an_even_share_leaves_over_as_they_do(
    layers: int, pp: int, vllm: list[int], sglang: list[int]
) -> None:
    for engine, lengths in (("vllm", vllm), ("sglang", sglang)):
        assert [len(engine_layers(engine, layers, pp, stage)) for stage in range(pp)] == lengths  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_embedding_goes_to_the_last_stage_too(tied: bool) -> None:
    known, stages = Architecture(4, 4, 2, 0, tied), EngineParallel(tp=1, pp=3)
    found = taken("model.embed_tokens.weight", (9, 4), known, "sglang", stages)
    assert [bool(boxes) for boxes in found] == [True, False, tied]


# --- plans ---


@pytest.mark.parametrize("decade", range(50))
def test_an_engine_gets_each_element_that_it_takes_once_and_nothing_else(decade: int) -> None:
    for seed in range(10 * decade, 10 * decade + 10):
        model, source, target = generated_pair(seed)
        manifest, known = model.manifest(), model.architecture
        whole = {spec.name: np.arange(1, 1 + np.prod(spec.shape)).reshape(spec.shape) for spec in manifest}
        ranks = range(target.parallel.world)
        arrived = {(rank, spec.name): np.zeros(spec.shape, int) for spec in manifest for rank in ranks}
        transfers = plan(manifest, known, source, target)
        owned = {(rank, name): box for rank, name, box in gather(manifest, known, source)}
        for transfer in transfers:
            holds = owned[transfer.source, transfer.name]  # only owners send
            block = whole[transfer.name][index(holds)][transfer.box.within(holds)]
            arrived[transfer.target, transfer.name][index(transfer.box)] += block
        for spec in manifest:
            for rank in ranks:
                takes = np.zeros(spec.shape, int)
                for box in engine_held(spec, known, target.engine, target.parallel, rank):
                    takes[index(box)] += 1
                assert takes.max(initial=0) <= 1
                assert (arrived[rank, spec.name] == takes * whole[spec.name]).all(), (seed, rank, spec)
            # between them the engine's ranks have all of it
            assert np.any([arrived[rank, spec.name] > 0 for rank in ranks], axis=0).all(), (seed, spec)


def test_generated_pairs_are_of_every_kind() -> None:
    pairs = [generated_pair(seed) for seed in range(500)]
    assert {model.family for model, _, _ in pairs} == set(FAMILIES)
    assert {target.engine for _, _, target in pairs} == {"transformers", "vllm", "sglang"}
    for axis in Coordinates._fields:
        assert sum(getattr(source, axis) > 1 for _, source, _ in pairs) > 20, axis
    for axis in ("tp", "pp", "ep"):
        assert sum(getattr(target.parallel, axis) > 1 for _, _, target in pairs) > 20, axis
    repeated = [target.parallel.tp > model.architecture.kv_heads for model, _, target in pairs]
    assert sum(repeated) > 20
    assert any(len(gather(model.manifest(), model.architecture, source)) > 100 for model, source, _ in pairs)


def test_a_plan_is_the_same_each_time_and_follows_the_manifest() -> None:
    for seed in range(20):
        model, source, target = generated_pair(seed)
        manifest = model.manifest()
        transfers = plan(manifest, model.architecture, source, target)
        assert transfers == plan(manifest, model.architecture, source, target)
        places = {spec.name: place for place, spec in enumerate(manifest)}
        order = [(places[transfer.name], transfer.target) for transfer in transfers]
        assert order == sorted(order)


@pytest.mark.parametrize("seed", range(25))
def test_digests_of_owners_boxes_add_up_to_that_of_the_whole_model(seed: int) -> None:
    rng = Random(seed)
    model = generated_model(rng)
    manifest, dtype = model.manifest(), rng.choice([torch.bfloat16, torch.float32, torch.uint8])
    noise = torch.Generator().manual_seed(seed)
    tensors = {spec.name: torch.randn(spec.shape, generator=noise).to(dtype) for spec in manifest}
    total = 0
    for _, name, box in gather(manifest, model.architecture, generated_policy(rng, model)):
        whole = tensors[name]
        total += box_sum(name, whole[index(box)], whole.shape, box)
    assert hexadecimal(total) == digest_of(tensors)


# --- layouts that cannot be ---

MOE = Architecture(layers=2, heads=4, kv_heads=2, experts=6, tied=False)


@pytest.mark.parametrize(
    ("known", "parallel", "expected"),
    [
        (DENSE, Parallel(tp=4), r"tp to divide .* 2 key/value heads, got tp = 4; choose"),
        (DENSE, Parallel(pp=3), r"a stage a layer, got 3 stages for 2 layers; lower pp"),
        (MOE, Parallel(ep=4), r"ep x tp to divide the 6 experts, got 4 x 1; lower"),
        (MOE, Parallel(ep=2, tp=2), r"ep x tp to divide the 6 experts, got 2 x 2; lower"),
    ],
)
def test_a_policy_layout_that_cannot_cut_the_model_is_refused(
    known: Architecture, parallel: Parallel, expected: str
) -> None:
    spec = Spec("model.layers.0.input_layernorm.weight", (4,))
    with pytest.raises(ValueError, match=expected):
        held(spec, known, parallel, 0)
    with pytest.raises(ValueError, match=expected):
        plan([spec], known, parallel, EngineLayout("transformers"))


@pytest.mark.parametrize(
    ("known", "target", "expected"),
    [
        (DENSE, EngineLayout("transformers", EngineParallel(tp=2)), r"one rank of the engine transformers, got .*tp=2"),
        (DENSE, EngineLayout("vllm", EngineParallel(tp=3)), r"vllm's tp to divide the 4 heads, .* got tp = 3; choose"),
        (DENSE, EngineLayout("sglang", EngineParallel(pp=3)), r"in sglang, got pp = 3 for 2 layers; lower pp"),
        (MOE, EngineLayout("sglang", EngineParallel(tp=4, ep=4)), r"ep to divide the 6 experts, got ep = 4; set ep"),
    ],
)
def test_an_engine_layout_that_the_engine_does_not_have_is_refused(
    known: Architecture, target: EngineLayout, expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        plan([Spec("model.layers.0.input_layernorm.weight", (4,))], known, Parallel(), target)


def test_what_else_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 1 rank, got .*fsdp=0"):
        Parallel(fsdp=0)
    with pytest.raises(ValueError, match=r"ep of 1 or of tp, got .*ep=2"):
        EngineParallel(tp=4, ep=2)
    with pytest.raises(ValueError, match=r"a rank from 0 to 3 .* got 4"):
        Parallel(fsdp=4).coordinates(4)
    with pytest.raises(ValueError, match=r"a rank from 0 to 1 .* got 2"):
        engine_held(Spec("model.norm.weight", (4,)), DENSE, "vllm", tp(2), 2)
    with pytest.raises(ValueError, match=r"got 3 stages for 2 layers"):
        stage_layers(2, 3, 0)
    with pytest.raises(ValueError, match=r"experts of a layer in stacks.*experts\.3\.up_proj"):
        split_of("model.layers.0.mlp.experts.3.up_proj.weight", [4, 4])
    with pytest.raises(ValueError, match=r"tp to divide the 5 rows or columns of .*up_proj.*got tp = 2"):
        engine_held(Spec("model.layers.0.mlp.up_proj.weight", (5, 4)), DENSE, "vllm", tp(2), 0)
