"""SGLang behind the interface of all engines, through its own engine class and its hooks for RL.

Its scheduler and detokenizer are processes of their own. Weights go to the schedulers as shared memory
(`sglang_worker`); tokens carry the weight version that SGLang recorded for them; prefixes of different weights never
meet, since each request's cache salt is its epoch.
"""

from __future__ import annotations

import asyncio
import atexit
import itertools
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from shared.config.schema import EngineParallelTable, Quantization
from shared.engines.endpoint import SERVED_NAME, Application
from shared.engines.hosted import HostedEngine, Made, Report, Sample
from shared.engines.processes import Watched
from shared.engines.ranks import invitation
from shared.engines.schemes import Schemes, check_layout, scheme_for
from shared.engines.thread import LOOK_S
from shared.models.images import Pixels
from shared.weights import StagedWeights
from shared.weights.memory import shared_memory

RESERVED, RESERVED_WITH_IMAGES = 2, 6
"""Tokens of a model's context that SGLang never generates; of one that takes images, whose prompts it has shorter."""
STREAM_TOKENS = 8
"""A running sample reports after so many tokens, for the figures of load and speed."""
ON_GPU: Schemes = {"fp8": "fp8", "mxfp8": "mxfp8", "mxfp4": "mxfp4", "nvfp4": "nvfp4_online"}
"""SGLang's own names of the schemes that quantise what is loaded; for CPUs it has none."""


def prepare_process(threads: int, ranks: int) -> None:
    """Settings that SGLang reads from the environment, before its first import; call it on the main thread."""
    import torch

    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    if not torch.cuda.is_available():
        os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
        if ranks > 1:  # it wants to be told which cores each rank has, in turns where there are not enough
            cores = itertools.cycle(sorted(os.sched_getaffinity(0)))
            each = [",".join(str(next(cores)) for _ in range(threads)) for _ in range(ranks)]
            os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "|".join(each))
    # its watchdog answers the death of a process with this signal to the whole service, which would end without a
    # reason; the engine notices by itself
    signal.signal(signal.SIGQUIT, signal.SIG_IGN)


class SglangEngine(HostedEngine):
    """SGLang on the model of `folder`, whose weights come by `update`; for what is not named here, see HostedEngine.

    `memory` is the share of a GPU's memory that it may take; on a CPU its cache holds `slots` sequences.
    """

    name = "SGLang"
    seeded = False  # it follows seeds with deterministic kernels alone, which are slow, and which a CPU does not have

    def __init__(
        self,
        folder: Path,
        *,
        dtype: str,
        seed: int,
        vocabulary: int,
        quantization: Quantization | None = None,
        memory: float,
        parallel: EngineParallelTable,
        context: int,
        **shared: Any,
    ) -> None:
        self._folder = folder
        self._dtype = dtype
        self._seed = seed
        self._vocabulary = vocabulary
        self._quantization = quantization
        self._memory = memory
        self._parallel = parallel
        self._engine: Any = None
        self._processes = Watched([])
        self._counts = Report()
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._reserved = RESERVED if shared.get("images") is None else RESERVED_WITH_IMAGES
        super().__init__(context=context - self._reserved, **shared)

    async def _start(self) -> None:
        import torch

        on_cpu = not torch.cuda.is_available()
        scheme = scheme_for(self.name, self._quantization, ON_GPU, {}, {})  # refused before the seconds of an import
        check_layout(self.name, self._parallel, ("ep",))
        from sglang.srt.entrypoints.engine import Engine

        from shared.engines.sglang_worker import LOADER, join_hook

        self._engine = Engine(
            model_path=str(self._folder),
            # with a tokenizer pixels go to the scheduler through shared memory
            skip_tokenizer_init=self._endpoint is None and self._images is None,
            served_model_name=SERVED_NAME,
            skip_server_warmup=True,
            load_format="dummy",
            custom_weight_loader=[LOADER],
            forward_hooks=[join_hook(invitation(self._client, self._call_s))] if self._client is not None else None,
            dtype=self._dtype,
            random_seed=self._seed,
            quantization=scheme,
            tp_size=self._parallel.tp,
            pp_size=self._parallel.pp,
            ep_size=self._parallel.ep,
            context_length=self.context + self._reserved,
            max_running_requests=self._slots,
            sampling_mask_max_tokens=self._vocabulary,
            stream_interval=STREAM_TOKENS,
            sleep_on_idle=True,
            weight_version=str(self.version),
            log_level="warning",
            **(self._on_cpu() if on_cpu else {"mem_fraction_static": self._memory}),
        )
        self._processes = Watched(self._engine.get_all_child_pids(), self._parallel.ranks)

    async def _application(self) -> Application:
        from sglang.srt.entrypoints import http_server

        engine, application = self._engine, http_server.app
        http_server.set_global_state(
            http_server._GlobalState(
                tokenizer_manager=engine.tokenizer_manager,
                template_manager=engine.template_manager,
                scheduler_info=engine._scheduler_init_result.scheduler_infos[0],
            )
        )
        application.is_single_tokenizer_mode = True
        application.server_args = engine.server_args
        application.warmup_thread_kwargs = {"server_args": engine.server_args}
        return cast(Application, application)

    def _on_cpu(self) -> dict[str, Any]:
        return {
            "device": "cpu",
            "attention_backend": "torch_native",
            "sampling_backend": "pytorch",
            "grammar_backend": "none",
            "disable_cuda_graph": True,
            "disable_overlap_schedule": True,
            "max_total_tokens": self._slots * (self.context + self._reserved),
        }

    async def _generate(self, sample: Sample) -> Made:
        asked = sample.sampling
        greedy = asked.temperature == 0
        cut = not greedy and (asked.top_p < 1 or asked.top_k > 0)
        parameters: dict[str, Any] = {
            "temperature": asked.temperature,
            "top_p": 1.0 if greedy else asked.top_p,
            "max_new_tokens": sample.limit,
            "stop_token_ids": self._stops,
        }
        if cut:
            parameters["top_k"] = asked.top_k or self._vocabulary
        from sglang.srt.managers.io_struct import GenerateReqInput

        request = GenerateReqInput(
            rid=sample.name,
            input_ids=list(sample.prompt),
            sampling_params=parameters,
            return_logprob=not cut,
            # of what is left by top-k and top-p, which the plain log-probabilities do not know
            return_sampling_mask=cut,
            cache_salt=str(sample.epoch),
            stream=True,
            **(_images(sample.pixels, sample.prompt, self._images.merge) if sample.pixels and self._images else {}),
        )
        counted, tokens, found = 0, [], {}
        async for chunk in self._engine.tokenizer_manager.generate_request(request, None):
            tokens, found = chunk["output_ids"], chunk["meta_info"]
            self._counts.tokens += found["completion_tokens"] - counted
            counted = found["completion_tokens"]
        reason = found["finish_reason"]["type"]
        if reason not in ("stop", "length", "abort"):
            raise RuntimeError(f"expected a whole sample, got one that ended as {found['finish_reason']}")
        if not tokens:  # aborted before it was computed
            return Made([], [], [], stopped=False)
        self._prompt_tokens += found["prompt_tokens"]
        self._cached_tokens += found["cached_tokens"]
        logprobs = found["output_token_sampling_logprobs"] if cut else [it[0] for it in found["output_token_logprobs"]]
        versions = [0] * len(tokens)
        for span in found["weight_versions"]:
            versions[span["start"] : span["end"]] = [int(span["version"])] * (span["end"] - span["start"])
        return Made(tokens, logprobs, versions, reason == "stop")

    async def _abort(self, sample: Sample) -> None:
        self._engine.tokenizer_manager.abort_request(sample.name)

    async def _pause(self) -> None:
        await self._pause_as("in_place")

    async def _pause_as(self, mode: str) -> None:
        from sglang.srt.managers.io_struct import PauseGenerationReqInput

        await self._engine.tokenizer_manager.pause_generation(PauseGenerationReqInput(mode=mode))

    async def _load(self, weights: StagedWeights, version: int, recompute: bool) -> None:
        from sglang.srt.managers.io_struct import (
            BeginWeightUpdateReqInput,
            EndWeightUpdateReqInput,
            UpdateWeightsFromTensorReqInput,
        )
        from sglang.srt.utils import MultiprocessingSerializer

        from shared.engines.sglang_worker import LOADER, Place, named_place

        manager = self._engine.tokenizer_manager
        if recompute:
            await self._pause_as("retract")  # running sequences give up their keys and values
        ranks = self._parallel.ranks
        taken = shared_memory(ranks)
        place = Place(weights.area.path, weights.area.manifest, taken.path, ranks)
        update = UpdateWeightsFromTensorReqInput(
            serialized_named_tensors=[MultiprocessingSerializer.serialize(named_place(place))] * self._parallel.tp,
            load_format=LOADER,
            flush_cache=recompute,
            weight_version=str(version),
        )
        _whole(await manager.begin_weight_update(BeginWeightUpdateReqInput(), None))
        _whole(await manager.update_weights_from_tensor(update, None))
        _whole(await manager.end_weight_update(EndWeightUpdateReqInput(), None))
        while not taken.data.all():  # noqa: ASYNC110 - later stages of a pipeline, which have nothing to signal with
            await asyncio.sleep(LOOK_S)

    async def _resume(self) -> None:
        from sglang.srt.managers.io_struct import ContinueGenerationReqInput

        await self._engine.tokenizer_manager.continue_generation(ContinueGenerationReqInput())

    async def _stop(self) -> None:
        # SGLang's own shutdown, also at the end of Python, kills every child of this process: reward workers, too
        if self._engine is not None:
            atexit.unregister(self._engine.shutdown)
        self._processes.kill()
        self._processes.close()

    def _death(self) -> str | None:
        ended = self._processes.ended()
        return f"its {ended} ended; its log is above" if ended is not None else None

    def _report(self) -> Report:
        self._counts.prefix_hits = self._cached_tokens / max(1, self._prompt_tokens)
        return self._counts


def _images(pixels: Pixels, prompt: Sequence[int], merge: int) -> dict[str, Any]:
    """The images as a request takes them, with the very pixels that the trainer would read.

    Given images as such, SGLang would decode the prompt, resize by its own choice of library, and look for images
    behind a token that marks their start. It names images by their pixels alone, whatever their grid, and fills
    their places in the prompt with the names, by which it finds prefixes again: so they come with names of ours.
    """
    from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem

    names, filled = pixels.names(), list(prompt)
    for name, (start, end) in zip(names, pixels.places, strict=True):
        item = MultimodalDataItem(modality=Modality.IMAGE)
        item.set_hash(int(name, 16))
        filled[start:end] = item.padding_sequence(end - start)
    positions = pixels.positions(len(prompt), merge)
    processed = {
        "format": "processor_output",
        "pixel_values": pixels.values,
        "image_grid_thw": pixels.grids,
        "offsets": [(start, end - 1) for start, end in pixels.places],
        "padded_input_ids": filled,
        "mrope_positions": positions,
        "mrope_position_delta": positions.max() + 1 - len(prompt),
    }
    return {"image_data": [processed], "mm_hashes": names}


def _whole(answer: Any) -> None:
    """RuntimeError unless the answer (success, message, ...) to an order is a yes."""
    success, message = (answer[0], answer[1]) if isinstance(answer, tuple) else (answer.success, answer.message)
    if not success:
        raise RuntimeError(f"SGLang refused new weights: {message}")
