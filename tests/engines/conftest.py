"""Which engine the contract is held against: `--engine`, each in the environment that has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from shared.config.schema import EngineParallelTable
from shared.engines.base import Engine
from shared.engines.folder import write_folder
from shared.weights import manifest_of
from tests.engines.families import CONTEXT, FAMILIES, SLOTS, STOP, reader, tiny, tokenizer
from tests.staged import stage

START_S, CALL_S = 180.0, 60.0
"""Time for an engine to start on a machine that does other things too, and for any call to it."""

MakeEngine = Callable[..., Engine]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--engine", choices=("transformers", "vllm", "sglang"), default="transformers")


@pytest.fixture(scope="session")
def engine_name(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--engine"))


@pytest.fixture(scope="session")
def make_engine(engine_name: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeEngine]:
    """Makes an engine of the chosen kind that holds a model's weights as version 0; all are closed at the end."""
    made: list[Engine] = []

    def make(model: PreTrainedModel, *, slots: int = SLOTS, **options: object) -> Engine:
        engine = start(engine_name, model, tmp_path_factory.mktemp("model"), slots, options)
        made.append(engine)
        replace(engine, model, 0)
        return engine

    yield make
    for engine in made:
        engine.close()


@pytest.fixture(scope="session")
def engines(make_engine: MakeEngine) -> Callable[[str], tuple[Engine, PreTrainedModel]]:
    """An engine of a family with the weights of `tiny(family)`, started once; each test gets it idle."""
    started: dict[str, tuple[Engine, PreTrainedModel]] = {}

    def get(family: str) -> tuple[Engine, PreTrainedModel]:
        if family not in started:
            model = tiny(family)
            started[family] = make_engine(model), model
        engine, model = started[family]
        assert (engine.stats().running, engine.stats().queued) == (0, 0)
        replace(engine, model, 0)
        return engine, model

    return get


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def replace(engine: Engine, model: PreTrainedModel, version: int, **options: object) -> None:
    """Give the engine the model's weights."""
    engine.pause()
    engine.update(stage(model), version, **options)  # type: ignore[arg-type]
    engine.resume()


def start(name: str, model: PreTrainedModel, folder: Path, slots: int, options: dict[str, object]) -> Engine:
    if name == "transformers":
        from copy import deepcopy

        from shared.engines.transformers import TransformersEngine

        options.pop("dtype", None)  # it has the model's own
        made = deepcopy(model)
        return TransformersEngine(made, slots=slots, stops=[STOP], images=reader(model), **options)  # type: ignore[arg-type]
    images = reader(model)
    write_folder(model, tokenizer() if images is not None else None, folder, images)
    common = {
        "dtype": "float32",
        "seed": 0,
        "memory": 0.5,
        "parallel": EngineParallelTable(),
        "manifest": manifest_of(model),
        "context": CONTEXT,
        "slots": slots,
        "stops": [STOP],
        "start_s": START_S,
        "call_s": CALL_S,
        "images": images,
        **options,
    }
    if name == "vllm":
        from shared.engines.vllm import VllmEngine, prepare_process

        prepare_process(threads=1, cache_bytes=1 << 28)
        return VllmEngine(folder, **common)  # type: ignore[arg-type]
    from shared.engines.sglang import SglangEngine
    from shared.engines.sglang import prepare_process as prepare_sglang

    prepare_sglang(threads=1, ranks=common["parallel"].ranks)  # type: ignore[attr-defined]
    vocabulary = model.config.get_text_config().vocab_size
    return SglangEngine(folder, vocabulary=vocabulary, **common)  # type: ignore[arg-type]
