"""`prosparse bench batching` in virtual time: vLLM's scheduler under ours is real, a step takes what it takes an H200.

    python -m tests.vllm_plugin.simulated_card --trace mix --rate 36.3 --load 0.6,0.9,1.2 --seed 0,1,2

prints a row for each lever of the scheduler, alone and together. Every row is one server that is given one load after the other.
"""

import argparse
import dataclasses
import itertools
import logging
import math
import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

from sparse_backend.bench.goodput import Objectives, Summary, summarise
from sparse_backend.bench.replay import Outcome
from sparse_backend.bench.trace import Trace, TraceRequest
from sparse_backend.vllm_plugin.batching import BatchingSettings
from sparse_backend.vllm_plugin.plan import Planner, StepPlan
from tests.vllm_plugin.fake_engine import FakeEngine, engine_config

ITL_SLO_MS, TTFT_SLO_MS = 75.0, 2000.0
BLOCKS = 14_300  # of 16 tokens: what is left on the card beside a 7B model
GRAPH_SIZES = (*range(512, 1024, 64), *range(1024, 2049, 128))
UNTIL_NEXT_S = 1.0


@dataclass
class SimulatedCard(FakeEngine):
    """A 7B model on an H200, for a server that schedules asynchronously.

    The device's times are fits to the step log of a replay, within 6 % for nine of ten steps. Launching a step takes the host
    what the logs show with few decodes, and so much more for each that steps of 180 come as seldom as they did
    (docs/results/h200-2026-11-29-batching.md). What it takes to schedule a step and to take its tokens in has not been measured
    by itself. Tokens per second come out within 4 % of the card's; nothing lies between the engine and the clients.
    """

    most_graph_rows: int = GRAPH_SIZES[-1]
    """Steps of more rows have no CUDA graph."""
    noise: random.Random = field(default_factory=lambda: random.Random(1))
    token_times: dict[str, list[float]] = field(default_factory=dict)

    def replay(self, requests: Sequence[TraceRequest]) -> list[Outcome]:
        """Send each request at its time; their names are free again afterwards."""
        start = self.now
        names = [str(index) for index in range(len(requests))]
        ahead = deque(zip(names, requests, strict=True))
        under_way: deque[tuple[SchedulerOutput, ModelRunnerOutput, float]] = deque()
        device_free_at = start
        self.token_times = {name: [] for name in names}
        while ahead or under_way or self.scheduler.has_unfinished_requests():
            while ahead and start + ahead[0][1].at_s <= self.now:
                name, request = ahead.popleft()
                self.add(name, request.prompt_tokens, request.output_tokens)
            if not under_way and not self.scheduler.has_unfinished_requests():
                self.now = start + ahead[0][1].at_s
                continue
            output = self.scheduler.schedule()
            self.now += 5e-4 + 1e-5 * len(output.num_scheduled_tokens)
            if output.total_num_scheduled_tokens:
                device_s, launch_s = self._step_times(output)
                begins_at = max(device_free_at, self.now + 1e-3)
                self.now += launch_s
                # The last kernel is launched last.
                self.ended_at = device_free_at = max(begins_at + device_s, self.now + 5e-4)
                under_way.append((output, self._compute(output), self.ended_at))
            if len(under_way) == 2 or not output.total_num_scheduled_tokens:
                if under_way:
                    self._take_in(*under_way.popleft())
                elif ahead:
                    self.now = max(self.now, start + ahead[0][1].at_s)
        return [
            self._outcome(request, self.token_times[name], start) for name, request in zip(names, requests, strict=True)
        ]

    def _take_in(self, output: SchedulerOutput, result: ModelRunnerOutput, ended_at: float) -> None:
        self.now = max(self.now, ended_at) + 5e-4 + 2.5e-5 * len(result.req_ids)
        self.scheduler.update_from_output(output, result)
        for name, tokens in zip(result.req_ids, result.sampled_token_ids, strict=True):
            if tokens:
                self.token_times[name].append(self.now)

    def _seconds(self, output: SchedulerOutput) -> float:
        return 0.0  # replay says when a step ends

    def _step_times(self, output: SchedulerOutput) -> tuple[float, float]:
        """Seconds on the device, and for which the host is busy launching it."""
        # Counted apart from the scheduler's own view of the step, which is what is tested.
        prompts = decodes = context = pairs = 0
        for name, tokens in output.num_scheduled_tokens.items():
            request = self.scheduler.requests[name]
            # vLLM has counted the step's tokens as computed already.
            start = request.num_computed_tokens - tokens
            if start < request.num_prompt_tokens and tokens > 1:
                prompts += tokens
                pairs += tokens * start + tokens**2 // 2
            else:
                decodes += 1
                context += start
        rows = prompts + decodes
        has_graph = rows <= self.most_graph_rows
        if not prompts:
            device_ms = 4.4 + 0.0203 * rows + 0.12e-3 * context
        elif rows <= 512:
            device_ms = 4.14 + 0.0162 * prompts + 0.0638 * decodes + 0.12e-3 * context
        else:
            padding = next(size for size in GRAPH_SIZES if size >= rows) - rows if has_graph else 0
            device_ms = 0.08 + 0.0211 * (prompts + padding) + 0.048 * decodes + 0.158e-3 * context + 0.59e-6 * pairs
        # Mixed steps are replayed piece by piece, the attention between them launched.
        launch_ms = (10.0 if prompts else 3.5) + 0.02 * decodes if has_graph else 30 + 0.12 * decodes
        return (
            1e-3 * max(4.2, device_ms) * self.noise.lognormvariate(0, 0.03),
            1e-3 * launch_ms * self.noise.lognormvariate(0, 0.2),
        )

    @staticmethod
    def _outcome(request: TraceRequest, times: Sequence[float], start: float) -> Outcome:
        sent_at = start + request.at_s
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        return Outcome(
            request.traffic_class, request.at_s, 200, times[0] - sent_at, gaps, len(times), times[-1] - start
        )


class _AlwaysTogether(Planner):
    """Without steps that leave decodes out."""

    def plan(self, *arguments: object, **options: object) -> StepPlan:
        return super().plan(*arguments, **{**options, "may_hold_back": False})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Levers:
    """Which of the scheduler's are used."""

    name: str
    policy: str = "sparse"
    turns: bool = False
    own_steps: bool = False
    graphs: bool = True

    def card(self) -> SimulatedCard:
        """A server with these."""
        settings = BatchingSettings(
            policy=self.policy,
            itl_slo_ms=ITL_SLO_MS,
            ttft_slo_ms=TTFT_SLO_MS,
            max_unfairness_ms=1000 if self.turns else 0,
        )
        config = engine_config(max_num_batched_tokens=8192, max_num_seqs=1024, max_model_len=4096)
        card = SimulatedCard(config, settings, BLOCKS, most_graph_rows=GRAPH_SIZES[-1] if self.graphs else 512)
        if not self.own_steps:
            planner = card.scheduler._planner
            card.scheduler._planner = _AlwaysTogether(planner.settings, planner.cost)
        return card


FCFS = Levers("fcfs", policy="fcfs")
ALL = Levers("pieces, turns, own steps", turns=True, own_steps=True)
LEVERS = (
    dataclasses.replace(FCFS, name="fcfs, graphs up to 512 rows", graphs=False),
    FCFS,
    Levers("pieces"),
    Levers("pieces, turns", turns=True),
    Levers("pieces, own steps", own_steps=True),
    ALL,
    dataclasses.replace(ALL, name="all of them, graphs up to 512 rows", graphs=False),
)


def replays(
    levers: Levers, trace: str, rate: float, loads: Sequence[float], seconds: float, seed: int
) -> Iterator[Summary]:
    """What comes of each load."""
    card = levers.card()
    for load in loads:
        requests = Trace.load(trace).requests(seed=seed, rate=load * rate, count=math.ceil(load * rate * seconds))
        outcomes = card.replay(requests)
        yield summarise(outcomes, Objectives(TTFT_SLO_MS * 1e-3, ITL_SLO_MS * 1e-3))
        card.now += UNTIL_NEXT_S


def main() -> None:
    """Print a table in Markdown; where there are several seeds, a value for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", default="mix")
    parser.add_argument("--rate", type=float, default=36.3, help="requests per second at load 1")
    parser.add_argument("--load", default="0.6,0.9,1.2")
    parser.add_argument("--seconds", type=float, default=35)
    parser.add_argument("--seed", default="0")
    arguments = parser.parse_args()
    # vLLM logs to where the table goes.
    logging.disable(logging.WARNING)
    loads = [float(load) for load in arguments.load.split(",")]
    print("| load | levers | good, % | tokens/s | TTFT p99, ms | ITL p99, ms |\n|---|---|---|---|---|---|")
    seeds = [int(seed) for seed in arguments.seed.split(",")]
    found = {
        levers: [
            list(replays(levers, arguments.trace, arguments.rate, loads, arguments.seconds, seed)) for seed in seeds
        ]
        for levers in LEVERS
    }
    for index, load in enumerate(loads):
        for levers, of_seeds in found.items():
            summaries = [of_seed[index] for of_seed in of_seeds]
            columns = (
                [f"{100 * summary['all']['good']:.0f}" for summary in summaries],
                [f"{summary['tokens_s']:.0f}" for summary in summaries],
                [f"{summary['all']['ttft_p99_ms']:.0f}" for summary in summaries],
                [f"{summary['all']['itl_p99_ms']:.0f}" for summary in summaries],
            )
            print(f"| {load:g} | {levers.name} | {' | '.join(', '.join(column) for column in columns)} |")


if __name__ == "__main__":
    main()
