"""vLLM's scheduler, told before each step how much the step is to carry.

What is scheduled and how stays vLLM's: only its limit of a step's tokens is set. Where anything that we go by is missing, vLLM's
own limit holds: first come, first served.
"""

import dataclasses
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import RequestQueue, SchedulingPolicy
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from sparse_backend.ffn.paths import DEFAULT_DENSITY
from sparse_backend.vllm_plugin.batching import (
    BatchingSettings,
    Decision,
    Fallback,
    FinishedRequest,
    Reporter,
    StepLog,
)
from sparse_backend.vllm_plugin.cost import LayerTable, StepCost, StepShape, layer_scale
from sparse_backend.vllm_plugin.densities import Densities
from sparse_backend.vllm_plugin.plan import Decode, Planner, Prefill, step_shape
from sparse_backend.vllm_plugin.snapshot import PATHS
from sparse_backend.vllm_plugin.step_records import StepRecord, StepRecordReader, file_of
from sparse_backend.vllm_plugin.turns import TurnQueue, turn

logger = logging.getLogger(__name__)

_LONGEST_STEP_S = 30.0  # what seems to take longer was a clock that jumped, or a machine that slept
_STEPS_TO_TRUST = 32  # without a fault, after one
_REPORT_EVERY_S = 0.5

_WARNINGS: dict[Fallback, str] = {
    "counters": "the layers' counters of a step did not arrive",
    "clock": "the clock jumped during a step",
}


@dataclass(frozen=True)
class _Step:
    """One under way."""

    shape: StepShape
    scheduled_at: float
    after_idle: bool


class SparseScheduler(AsyncScheduler):
    """Chooses what each step carries by its predicted time; see ``plan.Planner``."""

    max_num_scheduled_tokens: int
    waiting: RequestQueue

    def __init__(self, *args: Any, clock: Callable[[], float] = time.perf_counter, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._settings = BatchingSettings.from_environment()
        self._clock = clock
        self._vllm_tokens = self.max_num_scheduled_tokens
        try:
            self._records: StepRecordReader | None = StepRecordReader(file_of(self.vllm_config))
        except OSError:
            self._records = None
        self._densities = Densities(DEFAULT_DENSITY)
        self._planner = Planner(self._settings, self._new_cost())
        self._under_way: deque[_Step] = deque()
        self._arrived: dict[str, float] = {}
        # With vLLM's other policy requests come in the order of their priorities.
        if self._settings.policy == "sparse" and self._settings.has_objective and self.policy == SchedulingPolicy.FCFS:
            self.waiting = TurnQueue(self._turn)
        self._finished: list[FinishedRequest] = []
        self._done_at = 0.0
        self._ended_at: int | None = None
        """The step before, by the device's clock, nanoseconds."""
        self._idle = True
        self._after_prefill = False
        self._held_back = False
        """Whether the step before left decodes out."""
        self._hold_back_from = 0
        """From which step on that may be done; later, where it was in vain."""
        self._distrusted_for = 0
        self._fault: Fallback | None = None
        self._warned: set[Fallback] = set()
        self.decisions: Counter[Decision] = Counter()
        """Since the start."""
        self.fallbacks: Counter[Fallback] = Counter()
        self._reporter = Reporter(self._settings.report_to) if self._settings.report_to else None
        self._reported_at = 0.0
        self._step_log = StepLog(self._settings.step_log) if self._settings.step_log else None
        self._check_objectives()

    # ---- what vLLM calls -----------------------------------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        """Note when it came, by our clock: vLLM's is a wall clock, which may be set."""
        self._arrived[request.request_id] = self._clock()
        super().add_request(request)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Set vLLM's limit for this step, then let vLLM schedule it."""
        now = self._clock()
        waiting = len(self.waiting)
        if self._settings.policy == "fcfs":
            pass
        elif self._fault is None and self._records is not None:
            self._held_back = self._limit(now, may_hold_back=not throttle_prefills)
        else:
            self._unlimit()
        output = super().schedule(throttle_prefills)
        if self._held_back and not output.total_num_scheduled_tokens:
            self._hold_back_from = self.current_step + _STEPS_TO_TRUST
        if self._settings.policy == "sparse":
            self.decisions["admit"] += max(0, waiting - len(self.waiting))
        if output.total_num_scheduled_tokens:
            shape = self._shape_of(output)
            self._under_way.append(_Step(shape, now, self._idle))
            self._after_prefill = shape.prefill_tokens > 0
            self._idle = False
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Learn from the step, then let vLLM take its tokens in."""
        now = self._clock()
        if scheduler_output.total_num_scheduled_tokens:
            self._learn(scheduler_output, model_runner_output, self._under_way.popleft(), now)
        self._done_at = now
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        # Requests are let in anew, and not at the rhythm of steps, once there was nothing to do.
        self._idle = not self._under_way and not self.has_unfinished_requests()
        self._after_prefill = self._after_prefill and not self._idle
        if self._finished or now - self._reported_at >= _REPORT_EVERY_S:
            self._report(now)
        return outputs

    def shutdown(self) -> None:
        """The engine stops."""
        if self._reporter is not None:
            self._reporter.close()
        if self._step_log is not None:
            self._step_log.close()
        super().shutdown()

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> Any:
        self._arrived.pop(request.request_id, None)
        seen = self._densities.finish(request.request_id, _keys(request))
        if seen is not None:
            self._finished.append({"id": request.request_id, "density": seen[0], "rows": seen[1]})
        return super()._free_request(request, delay_free_blocks)

    # ---- before a step -------------------------------------------------------------------------------------------------------

    def _limit(self, now: float, *, may_hold_back: bool) -> bool:
        """Set the limit; returns whether decodes are left out."""
        if not self.waiting and not any(request.is_prefill_chunk for request in self.running):
            # Most steps only decode; that costs nothing to plan.
            self.max_num_scheduled_tokens = self._vllm_tokens
            return False
        # Decodes first: they must not be left without tokens by a prompt ahead of them.
        self.running.sort(key=lambda request: request.is_prefill_chunk)
        decodes, prefills = [], []
        blocks = self.kv_cache_manager.block_pool.get_num_free_blocks()
        places = self.max_num_running_reqs - len(self.running)
        for request in self.running:
            tokens = request.num_tokens_with_spec + request.num_output_placeholders - request.num_computed_tokens
            if request.is_prefill_chunk:
                prefills.append(self._prefill(request, tokens, now))
                blocks -= math.ceil(tokens / self.block_size)
            elif tokens > 0 and not self._has_its_last(request):
                decodes.append(Decode(request.num_computed_tokens, self._density(request), tokens))
        available = sum(prefill.tokens for prefill in prefills)
        for request in self.waiting:
            # Those beyond what a step can carry need not be looked at.
            if available >= self._vllm_tokens:
                break
            # Where vLLM's prefix cache has some of it, it takes less.
            blocks -= math.ceil(request.num_tokens / self.block_size)
            places -= 1
            prefills.append(self._prefill(request, request.num_tokens, now, fits=min(blocks, places) >= 0))
            available += request.num_tokens
        available = min(available, self._vllm_tokens)
        plan = self._planner.plan(
            decodes,
            prefills,
            available,
            after_prefill=self._after_prefill,
            held_back=self._held_back,
            may_hold_back=may_hold_back and self.current_step >= self._hold_back_from,
        )
        if available:
            self.decisions["chunk_cut" if plan.prompt_tokens < available else "chunk_full"] += 1
        # What the prompts leave of an uncut step may be used up: a cached prefix makes a prompt shorter than it looks.
        room = plan.prompt_tokens if plan.prompt_tokens < available else self._vllm_tokens
        rows = sum(decode.rows for decode in decodes) if plan.decodes else 0
        self.max_num_scheduled_tokens = min(self._vllm_tokens, max(1, rows + room))
        if plan.decodes:
            return False
        self.decisions["hold_back"] += 1
        for request in self.running:
            if not request.is_prefill_chunk:
                # vLLM counts its steps from one, and is about to begin the next.
                request.next_decode_eligible_step = max(request.next_decode_eligible_step, self.current_step + 2)
        return True

    def _has_its_last(self, request: Request) -> bool:
        """Whether the step under way gives it its last token, as vLLM sees it."""
        computed = request.num_computed_tokens + 2 - request.num_output_placeholders
        return request.num_output_placeholders > 0 and computed >= request.num_prompt_tokens + request.max_tokens

    def _turn(self, request: Request) -> float:
        trusted = self._fault is None and self._records is not None
        most_s = 1e-3 * self._settings.max_unfairness_ms if trusted else 0.0
        return turn(self._arrived.get(request.request_id, 0.0), request.num_prompt_tokens, most_s)

    def _unlimit(self) -> None:
        self.max_num_scheduled_tokens = self._vllm_tokens
        self._held_back = False
        self.decisions["fcfs"] += 1

    def _prefill(self, request: Request, tokens: int, now: float, *, fits: bool = True) -> Prefill:
        return Prefill(request.num_computed_tokens, tokens, now - self._arrived.get(request.request_id, now), fits)

    def _density(self, request: Request) -> float:
        running = self._densities.running(request.request_id)
        return self._densities.predict(_keys(request)) if running is None else running

    def _shape_of(self, output: SchedulerOutput) -> StepShape:
        """What vLLM made of the limit."""
        decodes, prefills = [], []
        for identity, tokens in output.num_scheduled_tokens.items():
            request = self.requests[identity]
            # vLLM has counted the step's tokens as computed already.
            start = request.num_computed_tokens - tokens
            if start < request.num_prompt_tokens and tokens > 1:
                prefills.append(Prefill(start, tokens))
            else:
                decodes.append(Decode(start, self._density(request), tokens))
        return step_shape(decodes, prefills, sum(prefill.tokens for prefill in prefills), self._after_prefill)

    # ---- after a step --------------------------------------------------------------------------------------------------------

    def _learn(self, output: SchedulerOutput, result: ModelRunnerOutput, step: _Step, now: float) -> None:
        fault: Fallback | None = None
        record = None
        if self._records is not None:
            record = self._records.next_step(output.total_num_scheduled_tokens)
            if record is None:
                self._records.catch_up()
                fault = "counters"
            else:
                self._learn_densities((record.active / self._records.facts["neurons"]).tolist(), output, result)
        seconds = self._seconds(step, record, now)
        if self._step_log is not None:
            self._log(self._step_log, step, seconds, now - self._done_at)
        if not 0 < seconds < _LONGEST_STEP_S:
            fault = "clock"
        elif not (step.after_idle and self.scheduler_config.async_scheduling):
            # Steps overlap with the host's work, but not the first one after a pause.
            self._planner.cost.observe(step.shape, seconds)
        self._trust(fault)

    def _seconds(self, step: _Step, record: StepRecord | None, now: float) -> float:
        """From the end of the step before to its end, both on the device; after a pause, or without records, on the host."""
        before, self._ended_at = self._ended_at, None if record is None else record.ended_at
        if step.after_idle:
            return now - step.scheduled_at
        if before is None or record is None:
            return now - self._done_at
        return 1e-9 * (record.ended_at - before)

    def _log(self, log: StepLog, step: _Step, seconds: float, host_seconds: float) -> None:
        cost = self._planner.cost
        log.write(
            {
                "path": cost.path(step.shape),
                **dataclasses.asdict(step.shape),  # type: ignore[typeddict-item]
                "seconds": seconds,
                "host_seconds": host_seconds,
                "predicted": cost.seconds(step.shape),
                "after_idle": step.after_idle,
                "replica": self.parallel_config.data_parallel_index,
            }
        )

    def _learn_densities(self, densities: list[float], output: SchedulerOutput, result: ModelRunnerOutput) -> None:
        start = 0
        for identity in result.req_ids:
            end = start + output.num_scheduled_tokens[identity]
            # One that finished while the step was under way is forgotten already.
            if identity in self.requests:
                self._densities.observe(identity, densities[start:end])
            start = end

    def _trust(self, fault: Fallback | None) -> None:
        if fault is None:
            self._distrusted_for = max(0, self._distrusted_for - 1)
            if not self._distrusted_for:
                self._fault = None
            return
        self._fault, self._distrusted_for = fault, _STEPS_TO_TRUST
        self.fallbacks[fault] += 1
        self._warn(fault)

    def _warn(self, fault: Fallback) -> None:
        if self._settings.policy == "sparse" and fault not in self._warned:
            self._warned.add(fault)
            logger.warning(
                "--batching sparse: %s. Steps are scheduled first come, first served until it works again;"
                " sparse_scheduler_fallbacks_total counts how often.",
                _WARNINGS[fault],
            )

    # ---- the rest ------------------------------------------------------------------------------------------------------------

    def _new_cost(self) -> StepCost:
        if self._records is None:
            return StepCost(LayerTable([], []), scale=1.0, max_sparse_rows=0)
        facts = self._records.facts
        limits = sorted(facts["max_sparse_rows"])
        config = self.vllm_config.model_config.hf_config
        return StepCost(
            LayerTable(facts["sparse_us"], facts["dense_us"]),
            scale=layer_scale(len(limits), config.hidden_size, config.intermediate_size, config.vocab_size),
            # Where layers differ, most of them decide.
            max_sparse_rows=limits[len(limits) // 2],
        )

    def _check_objectives(self) -> None:
        if self._settings.policy == "fcfs":
            return
        if self._records is None:
            self.fallbacks["counters"] += 1
            self._warn("counters")
            return
        if not self._records.facts["sparse_us"]:
            return
        alone = 1e3 * self._planner.cost.seconds(StepShape(1, union=DEFAULT_DENSITY))
        for flag, objective in (
            ("--itl-slo-ms", self._settings.itl_slo_ms),
            ("--ttft-slo-ms", self._settings.ttft_slo_ms),
        ):
            if objective is not None and alone > objective:
                logger.warning(
                    "%s %g cannot be met: a step with a single row is predicted to take %.1f ms. The server does what it"
                    " can; give at least %.0f.",
                    flag,
                    objective,
                    alone,
                    2 * alone,
                )

    def _report(self, now: float) -> None:
        finished, self._finished = self._finished, []
        self._reported_at = now
        if self._reporter is None:
            return
        cost = self._planner.cost
        running = [self._densities.running(request.request_id) for request in self.running]
        self._reporter.send(
            {
                "replica": self.parallel_config.data_parallel_index,
                "decisions": dict(self.decisions),
                "fallbacks": dict(self.fallbacks),
                "errors": {path: error for path in PATHS if (error := cost.error(path)) is not None},
                "running": [density for density in running if density is not None],
                "finished": finished,
            }
        )


def _keys(request: Request) -> Iterable[Hashable]:
    """What a request may have in common with others of its density, most telling first."""
    if request.block_hashes:
        yield request.block_hashes[0]
    if request.session_id is not None:
        yield "session", request.session_id
