"""Our scheduler over vLLM's, with a clock and a worker made up: what is scheduled is real, nothing is computed."""

import tempfile
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from sparse_backend.ffn import counters
from sparse_backend.ffn.counters import DENSE, ROWS, STEPS
from sparse_backend.vllm_plugin import step_records
from sparse_backend.vllm_plugin.batching import SETTINGS_VARIABLE, BatchingSettings
from sparse_backend.vllm_plugin.scheduler import SparseScheduler
from sparse_backend.vllm_plugin.step_records import StepRecordWriter

DEMO = Path(__file__).parents[2] / "deploy" / "demo"
NEURONS = 1000
BLOCK = 16
MOST_TOKENS = 128


def engine_config(
    max_num_batched_tokens: int = MOST_TOKENS, max_num_seqs: int = 8, max_model_len: int = 512
) -> VllmConfig:
    """Of the demo, small limits."""
    arguments = EngineArgs(
        model=str(DEMO),
        hf_overrides={"architectures": ["SparseLlamaForCausalLM"], "max_position_embeddings": max_model_len},
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        enforce_eager=True,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=1 << 26,
    )
    return arguments.create_engine_config()


@dataclass
class FakeEngine:
    """An engine of which only the scheduler is real."""

    config: VllmConfig
    settings: BatchingSettings
    blocks: int = 200
    counting: bool = True
    """Whether the worker counts rows."""
    seconds: Callable[[int], float] = lambda tokens: 2e-3 + 1e-4 * tokens
    """How long a step of so many tokens takes."""
    beside: float = 0.0
    """How much longer for each decode that has prompts beside it."""
    host_seconds: Callable[[int], float] | None = None
    """How much later than of the one before the host learns of its end; None: as much."""
    densities: dict[str, float] = field(default_factory=dict)
    now: float = 1000.0
    """Seconds, on the host."""
    ended_at: float = 5000.0
    """Seconds, on the device: when the last step launched will have ended."""
    steps: list[SchedulerOutput] = field(default_factory=list)
    admitted_at: dict[str, float] = field(default_factory=dict)
    finished_at: dict[str, float] = field(default_factory=dict)

    sparse_us: list[tuple[int, float, float]] = field(default_factory=list)
    """Measured for one layer: rows, union, microseconds."""

    def __post_init__(self) -> None:
        with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
            patch.setenv(SETTINGS_VARIABLE, self.settings.model_dump_json())
            patch.setattr(step_records, "_FOLDER", Path(folder))
            self._start()

    def _start(self) -> None:
        self.counters = counters.new_counters()
        self.row_active = torch.zeros(self.config.scheduler_config.max_num_batched_tokens, dtype=torch.int32)
        if self.counting:
            self.writer = StepRecordWriter(
                step_records.file_of(self.config),
                self.counters,
                self.row_active,
                {"neurons": NEURONS, "max_sparse_rows": [4], "sparse_us": self.sparse_us, "dense_us": []},
                read_clock=lambda nanoseconds: nanoseconds.fill_(round(1e9 * self.ended_at)),
            )
        self.config.cache_config.num_gpu_blocks = self.blocks
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
        self.scheduler = SparseScheduler(
            vllm_config=self.config,
            kv_cache_config=KVCacheConfig(
                num_blocks=self.blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
            ),
            structured_output_manager=StructuredOutputManager(self.config),
            block_size=BLOCK,
            log_stats=True,
            clock=lambda: self.now,
        )
        self._pipeline: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()

    def add(self, name: str, prompt: int, output: int, density: float = 0.1) -> None:
        """One request arrives."""
        parameters = SamplingParams(max_tokens=output, ignore_eos=True)
        parameters.update_from_generation_config({}, None)
        self.densities[name] = density
        self.scheduler.add_request(
            Request(request_id=name, prompt_token_ids=[7] * prompt, sampling_params=parameters, pooling_params=None)
        )

    def step(self, depth: int = 1) -> SchedulerOutput:
        """Schedule one step; with ``depth`` steps under way, the oldest ends."""
        output = self.scheduler.schedule()
        self.steps.append(output)
        for name in output.num_scheduled_tokens:
            self.admitted_at.setdefault(name, self.now)
        if output.total_num_scheduled_tokens:
            self._pipeline.append((output, self._compute(output)))
        if len(self._pipeline) >= depth or not output.total_num_scheduled_tokens:
            self.end_step()
        return output

    def end_step(self) -> None:
        """The oldest step under way ends, if there is one."""
        if not self._pipeline:
            return
        output, result = self._pipeline.popleft()
        tokens = output.total_num_scheduled_tokens
        self.now += self.host_seconds(tokens) if self.host_seconds else self._seconds(output)
        self.scheduler.update_from_output(output, result)
        for name in output.num_scheduled_tokens:
            if name not in self.scheduler.requests:
                self.finished_at.setdefault(name, self.now)

    def drain(self, most_steps: int = 2000, depth: int = 1) -> None:
        """Until nothing is left to do."""
        for _ in range(most_steps):
            if not self.scheduler.has_unfinished_requests():
                return
            self.step(depth)
        raise AssertionError(f"{self.scheduler.get_num_unfinished_requests()} requests are not finished")

    def _seconds(self, output: SchedulerOutput) -> float:
        decodes = list(output.num_scheduled_tokens.values()).count(1)
        has_prompts = len(output.num_scheduled_tokens) > decodes
        return self.seconds(output.total_num_scheduled_tokens) + has_prompts * decodes * self.beside

    def _compute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        names = list(output.num_scheduled_tokens)
        sampled: list[list[int]] = []
        row = 0
        for name in names:
            tokens = output.num_scheduled_tokens[name]
            self.row_active[row : row + tokens] += round(NEURONS * self.densities[name])
            row += tokens
            request = self.scheduler.requests[name]
            # vLLM has counted the step's tokens as computed already; a prompt read in part gives no token.
            sampled.append([] if request.is_prefill_chunk else [7])
        self.counters[DENSE, ROWS] += row
        self.counters[DENSE, STEPS] += 1
        self.ended_at += self._seconds(output)
        if self.counting:
            self.writer.publish()
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=sampled,
        )
