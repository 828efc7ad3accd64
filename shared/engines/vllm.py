"""vLLM behind the interface of all engines, through its asynchronous engine and its own hooks for RL.

Its scheduler and its workers are processes of their own. Weights go to the workers as shared memory (`vllm_worker`);
tokens carry the weight version that vLLM recorded for them; prefixes of different weights never meet, since each
request's cache salt is its epoch.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec

from shared.compiler import lacking
from shared.config.schema import EngineParallelTable, Quantization
from shared.engines.endpoint import SERVED_NAME, Application
from shared.engines.hosted import HostedEngine, Made, Report, Sample
from shared.engines.processes import Watched, own_engines
from shared.engines.ranks import invitation
from shared.engines.schemes import Schemes, check_layout, scheme_for
from shared.weights import StagedWeights

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.metrics.stats import IterationStats, SchedulerStats

GIGABYTE = 1 << 30
PREFILL_TOKENS = 4096
"""Tokens that a CPU computes in one step; a single longer prompt goes alone."""
ON_GPU: Schemes = {
    "fp8": "fp8_per_channel",
    "fp8_block": "fp8_per_block",
    "mxfp8": "mxfp8",
    "mxfp4": "mxfp4",
    "nvfp4": "nvfp4_per_token",
}
"""vLLM's own names of the schemes that quantise what is loaded."""
ON_CPU: Schemes = {"fp8": "fp8_per_channel"}
"""Without AMX: by a reference kernel, of which a test can wait for a few tokens, and a run cannot."""
WITH_AMX: Schemes = {"fp8_block": "fp8_per_block"}


def prepare_process(threads: int, cache_bytes: int) -> None:
    """Settings that vLLM reads from the environment, before its first import; what is set already stays."""
    own_engines()
    for name, value in {
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        # replicas share a machine: pinned threads of two would meet on the same cores
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, math.ceil(cache_bytes / GIGABYTE))),
        "OMP_NUM_THREADS": str(threads),
        **without_compiler(),
    }.items():
        os.environ.setdefault(name, value)


def without_compiler() -> dict[str, str]:
    """What lets vLLM run where it cannot compile: its functions are then called as they are written.

    On CPUs it compiles a few of them at the first prompt, eager mode or not, and dies without a C++ compiler or without
    Python's headers.
    """
    import torch

    return {} if torch.cuda.is_available() or lacking() is None else {"TORCH_COMPILE_DISABLE": "1"}


class _Meter:
    """What vLLM reports of each iteration: made into a logger of its statistics by `logger`."""

    def __init__(self) -> None:
        self.report = Report()
        self._queries = 0
        self._hits = 0

    def record(self, scheduler: SchedulerStats | None, iteration: IterationStats | None) -> None:
        """Take one iteration's figures."""
        if scheduler is not None:
            self._queries += scheduler.prefix_cache_stats.queries
            self._hits += scheduler.prefix_cache_stats.hits
            self.report.kv_use = scheduler.kv_cache_usage
            self.report.prefix_hits = self._hits / max(1, self._queries)
        if iteration is not None:
            self.report.tokens += iteration.num_generation_tokens

    def logger(self) -> Any:
        """A factory of loggers, as vLLM wants it, that report here."""
        from vllm.v1.metrics.loggers import StatLoggerBase

        meter = self

        class Logger(StatLoggerBase):
            def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
                pass

            def record(
                self,
                scheduler_stats: SchedulerStats | None,
                iteration_stats: IterationStats | None,
                mm_cache_stats: object = None,
                engine_idx: int = 0,
            ) -> None:
                meter.record(scheduler_stats, iteration_stats)

            def log_engine_initialized(self) -> None:
                pass

        return Logger


class VllmEngine(HostedEngine):
    """vLLM on the model of `folder`, whose weights come by `update`; for what is not named here, see HostedEngine.

    `memory` is the share of a GPU's memory that it may take; on a CPU `prepare_process` says what its cache may take.
    """

    name = "vLLM"

    def __init__(
        self,
        folder: Path,
        *,
        dtype: str,
        seed: int,
        quantization: Quantization | None = None,
        memory: float,
        parallel: EngineParallelTable,
        **shared: Any,
    ) -> None:
        self._folder = folder
        self._dtype = dtype
        self._seed = seed
        self._quantization = quantization
        self._memory = memory
        self._parallel = parallel
        self._meter = _Meter()
        self._engine: Any = None
        self._workers = Watched([])
        super().__init__(**shared)

    async def _start(self) -> None:
        from vllm.config import WeightTransferConfig
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        from shared.engines.vllm_names import BACKEND, EXTENSION

        on_cpu = current_platform.is_cpu()
        check_layout(self.name, self._parallel, ("pp", "ep"))
        arguments = AsyncEngineArgs(
            model=str(self._folder),
            # its code for images wants a tokenizer to start with
            skip_tokenizer_init=self._endpoint is None and self._images is None,
            load_format="dummy",
            dtype=self._dtype,
            seed=self._seed,
            quantization=scheme_for(self.name, self._quantization, ON_GPU, ON_CPU, WITH_AMX),
            tensor_parallel_size=self._parallel.tp,
            pipeline_parallel_size=self._parallel.pp,
            enable_expert_parallel=self._parallel.ep > 1,
            max_model_len=self.context,
            max_num_seqs=self._slots,
            # what a worker reports is the distribution that tokens are drawn from
            logprobs_mode="processed_logprobs",
            enable_prefix_caching=True,
            worker_extension_cls=EXTENSION,
            weight_transfer_config=WeightTransferConfig(backend=BACKEND),
            **(self._for_images(on_cpu) if self._images is not None else {}),
            **(self._on_cpu() if on_cpu else {"gpu_memory_utilization": self._memory}),
        )
        self._engine = AsyncLLM.from_engine_args(arguments, stat_loggers=[self._meter.logger()])
        await self._engine.init_weight_transfer_engine(WeightTransferInitRequest())
        await self._engine.update_weight_version(str(self.version))
        self._workers = Watched(await self._engine.collective_rpc("process_id"), self._parallel.ranks)
        if self._client is not None:
            await self._engine.collective_rpc("join_replica", args=(invitation(self._client, self._call_s),))

    def _for_images(self, on_cpu: bool) -> dict[str, Any]:
        return {
            "limit_mm_per_prompt": {"video": 0},
            "mm_processor_cache_gb": 0,  # pixels come with each request,
            "mm_device_do_normalize": False,  # and are normalised
            "skip_mm_profiling": on_cpu,  # it reads the largest image there can be, for the use of a GPU's memory
        }

    async def _application(self) -> Application:
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        options = ["--model", str(self._folder), "--served-model-name", SERVED_NAME]
        arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(options)
        tasks = await self._engine.get_supported_tasks()
        application = build_app(arguments, tasks, self._engine.model_config)
        await init_app_state(self._engine, application.state, arguments, tasks)
        return cast(Application, application)

    def _on_cpu(self) -> dict[str, Any]:
        return {
            "enforce_eager": True,  # there are no graphs to capture
            "block_size": 32,
            # half a prompt wants a seeded generator set back by a draw, which those of a CPU cannot
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(PREFILL_TOKENS, self.context),
        }

    async def _generate(self, sample: Sample) -> Made:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        asked = sample.sampling
        greedy = asked.temperature == 0
        parameters = SamplingParams(
            temperature=asked.temperature,
            top_p=1.0 if greedy else asked.top_p,
            top_k=0 if greedy else asked.top_k,
            max_tokens=sample.limit,
            seed=sample.stream,
            stop_token_ids=self._stops,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        output = None
        async for last in self._engine.generate(_input(sample), parameters, sample.name):
            output = last.outputs[0]
        if output is None or output.finish_reason not in ("stop", "length", "abort"):
            raise RuntimeError(f"expected a whole sample, got one that ended as {output and output.finish_reason!r}")
        if not output.token_ids:  # aborted before it was computed
            return Made([], [], [], stopped=False)
        versions = [0] * len(output.token_ids)
        for span in output.weight_versions:
            versions[span.start : span.end] = [int(span.version)] * (span.end - span.start)
        return Made(output.token_ids, output.logprobs.logprobs, versions, output.finish_reason == "stop")

    async def _abort(self, sample: Sample) -> None:
        await self._engine.abort(sample.name)

    async def _pause(self) -> None:
        await self._engine.pause_generation(mode="keep", clear_cache=False)

    async def _load(self, weights: StagedWeights, version: int, recompute: bool) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        where = {"path": weights.area.path, "manifest": msgspec.msgpack.encode(weights.area.manifest)}
        await self._engine.start_weight_update()
        await self._engine.update_weights(WeightTransferUpdateRequest(update_info=where))
        await self._engine.finish_weight_update(str(version))
        if recompute:
            await self._engine.reset_prefix_cache(reset_running_requests=True)
        if self._images is not None:
            await self._engine.reset_encoder_cache()  # of what the old vision tower saw

    async def _resume(self) -> None:
        await self._engine.resume_generation()

    async def _stop(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()
            self._engine = None
        self._workers.kill()  # one that is stopped cannot end by itself
        self._workers.close()

    def _death(self) -> str | None:
        ended = self._workers.ended()
        if ended is not None:
            return f"its {ended} ended; its log is above"
        if self._engine is not None and self._engine.errored:
            return "its scheduler ended; its log is above"
        return None

    def _report(self) -> Report:
        return self._meter.report


def _input(sample: Sample) -> Any:
    """The prompt as vLLM's engine takes it, with the very pixels that the trainer would read.

    Given images as such, vLLM would resize them by its own choice of library and count their tokens by itself.
    """
    from vllm.inputs.engine import mm_input, tokens_input
    from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems, PlaceholderRange

    prompt, salt, pixels = list(sample.prompt), str(sample.epoch), sample.pixels
    if pixels is None:
        return tokens_input(prompt, cache_salt=salt)
    from transformers import BatchFeature

    fields = {
        "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", pixels.grids.prod(-1)),
        "image_grid_thw": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
    }
    values = BatchFeature({"pixel_values": pixels.values, "image_grid_thw": pixels.grids})
    return mm_input(
        prompt,
        MultiModalKwargsItems.from_hf_inputs(values, fields),
        {"image": pixels.names()},
        {"image": [PlaceholderRange(start, end - start) for start, end in pixels.places]},
        cache_salt=salt,
    )
