"""The replays of `prosparse bench batching`: which policies there are, what they are given, what comes of it."""

import contextlib
import functools
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TypedDict

import torch
import uvloop
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from sparse_backend.bench import machine, replay
from sparse_backend.bench.goodput import Objectives, Summary, summarise
from sparse_backend.bench.machine import Machine
from sparse_backend.bench.prompts import held_out_prompts
from sparse_backend.bench.replay import Client, OneServer, Outcome, Prompt, Router
from sparse_backend.bench.routing import ByDensity, Even
from sparse_backend.bench.server_process import ServerProcess
from sparse_backend.bench.synthetic_model import SyntheticModel
from sparse_backend.bench.trace import Trace, TraceRequest
from sparse_backend.bench.trace import names as trace_names
from sparse_backend.checkpoint import Checkpoint
from sparse_backend.errors import UserError
from sparse_backend.ffn import paths
from sparse_backend.vllm_plugin.cost import LayerTable, StepCost, layer_scale

POLICIES: dict[str, tuple[str, list[str]]] = {
    "fcfs": ("fcfs", []),
    # What a user can do without a cost model: one limit of a step's tokens for all times.
    "fcfs-2048": ("fcfs", ["--max-num-batched-tokens", "2048"]),
    "fcfs-512": ("fcfs", ["--max-num-batched-tokens", "512"]),
    "sparse": ("sparse", []),
}
"""--batching, and flags of vLLM's."""

PLACEMENTS = ("even", "density")

_TEXTS = 64
_LEAST_REQUESTS = 8
_SATURATION_REQUESTS = 4096


class Replay(TypedDict):
    """One policy at one load."""

    policy: str
    trace: str
    load: float | None
    """Share of capacity; None with ``clients``."""
    rate: float | None
    """Requests per second; None with ``clients``."""
    clients: int | None
    """So many, each of which asks anew when it has its answer; None where requests come at their own times."""
    cost_error: dict[str, float]
    """Median relative error of the predicted step times at the end of the replay, by path."""
    decisions: dict[str, float]
    """The scheduler's since the server's start."""
    fallbacks: dict[str, float]
    summary: Summary


class BatchingReport(TypedDict):
    """The whole output."""

    machine: Machine
    model: str
    itl_slo_ms: float | None
    ttft_slo_ms: float | None
    seed: int
    capacity: dict[str, float]
    """Requests per second, by trace."""
    replays: list[Replay]


@dataclass(frozen=True)
class Plan:
    """What to run."""

    policies: list[str]
    placements: list[str]
    """Over ``replicas`` of the first policy; empty: one replica of each."""
    replicas: int
    traces: dict[str, Trace]
    loads: list[float]
    clients: list[int]
    """In place of ``loads``, if there are any."""
    rate: float | None
    seconds: float
    saturate_s: float
    at_once: int
    seed: int
    objectives: Objectives
    log_steps: bool
    """Write each server's step log beside its output."""
    settings: list[str]
    vllm_flags: list[str]


@dataclass(frozen=True)
class _Traffic:
    """What a replay sends: ``rate`` requests per second, or as many as ``clients`` get answered."""

    trace: str
    load: float | None = None
    rate: float | None = None
    clients: int | None = None


_Task = Callable[[list[str], str], list[Outcome]]
"""What a process is to do with the servers' addresses and the model's name."""


def densities(plan: Plan) -> dict[str, float]:
    """Of all classes of all traces, those that come with the product first: a synthetic checkpoint then fits all of these.

    Raises:
        UserError: traces differ over a class.
    """
    densities: dict[str, float] = {}
    for trace in (*map(Trace.load, trace_names()), *plan.traces.values()):
        for name, of_class in trace.classes.items():
            if densities.setdefault(name, of_class.density) != of_class.density:
                raise UserError(
                    f"--trace: class {name} has density {densities[name]:g} in another trace. Call it otherwise."
                )
    return densities


class Prompts:
    """The requests of a trace with their tokens."""

    def __init__(self, checkpoint: Checkpoint, synthetic: SyntheticModel | None, plan: Plan, corpus: str) -> None:
        self._seed, self._synthetic = plan.seed, synthetic
        self._classes = list(densities(plan))
        classes = [of_class for trace in plan.traces.values() for of_class in trace.classes.values()]
        longest = max(of_class.prompt_tokens.most + of_class.output_tokens.most for of_class in classes)
        # Lengths are for a context such as LLaMA2's; a model with a shorter one gets the same traffic in miniature.
        self._scale = min(1.0, (checkpoint.context_length - 1) / longest)
        prompt = max(1, round(self._scale * max(of_class.prompt_tokens.most for of_class in classes)))
        self._texts = [] if synthetic else held_out_prompts(checkpoint.folder, corpus, _TEXTS, prompt, plan.seed)

    def of(self, trace: Trace, rate: float, count: int, replay: str) -> list[Prompt]:
        """``count`` requests, ``rate`` per second; another ``replay`` has other tokens, which no prefix cache holds."""
        generator = random.Random(f"{self._seed} {replay}")  # noqa: S311 - reproducible sampling, nothing secret
        requests = trace.requests(seed=self._seed, rate=rate, count=count, scale=self._scale)
        return [Prompt(request, self._tokens(request, generator)) for request in requests]

    def _tokens(self, request: TraceRequest, generator: random.Random) -> list[int]:
        if self._synthetic is None:
            text = generator.choice(self._texts)
            start = generator.randrange(len(text) - request.prompt_tokens + 1)
            return text[start : start + request.prompt_tokens]
        tokens = self._synthetic.class_tokens(self._classes.index(request.traffic_class))
        return generator.choices(tokens, k=request.prompt_tokens)


def measure(checkpoint: Checkpoint, plan: Plan, prompts: Prompts, logs: Path) -> Iterator[BatchingReport]:
    """Replay every trace at every load under every policy; the report so far, after each."""
    gpus = torch.cuda.device_count()
    described = machine.describe(torch.device("cuda" if gpus else "cpu"))
    if gpus:
        torch.cuda.empty_cache()
    report: BatchingReport = {
        "machine": described,
        "model": checkpoint.folder.name,
        "itl_slo_ms": None if plan.objectives.itl_s is None else plan.objectives.itl_s * 1e3,
        "ttft_slo_ms": None if plan.objectives.ttft_s is None else plan.objectives.ttft_s * 1e3,
        "seed": plan.seed,
        "capacity": {} if plan.rate is None or plan.clients else dict.fromkeys(plan.traces, plan.rate),
        "replays": [],
    }
    if plan.placements:
        yield from _measure_placements(checkpoint, plan, prompts, logs, report)
        return
    at_once = max(1, gpus)
    for first in range(0, len(plan.policies), at_once):
        yield from _measure_policies(checkpoint, plan, prompts, logs, plan.policies[first : first + at_once], report)


def _measure_policies(
    checkpoint: Checkpoint, plan: Plan, prompts: Prompts, logs: Path, policies: Sequence[str], report: BatchingReport
) -> Iterator[BatchingReport]:
    """Replay under some policies at the same time."""
    with _servers(checkpoint, plan, logs, policies) as servers, _pool(len(servers)) as pool:
        for name, trace in plan.traces.items():
            if not plan.clients and name not in report["capacity"]:
                warm_up = prompts.of(trace, 1.0, _SATURATION_REQUESTS, "saturation")
                task = functools.partial(_saturate, OneServer(), warm_up, plan.at_once, plan.saturate_s)
                rates = [_finished_per_s(outcomes, plan.saturate_s) for outcomes in _on_each(pool, servers, task)]
                report["capacity"][name] = rates[0]
                _say(f"{name}: at capacity {', '.join(f'{p} {r:.2f}/s' for p, r in zip(policies, rates, strict=True))}")
            for traffic in _traffic(plan, name, report["capacity"].get(name)):
                replays = _on_each(pool, servers, _task(prompts, trace, traffic, OneServer(), plan))
                for policy, server, outcomes in zip(policies, servers, replays, strict=True):
                    report["replays"].append(_result(policy, traffic, outcomes, [server], plan))
                    _say(_line(report["replays"][-1]))
                yield report


def _measure_placements(
    checkpoint: Checkpoint, plan: Plan, prompts: Prompts, logs: Path, report: BatchingReport
) -> Iterator[BatchingReport]:
    """Replay over several replicas, one way to place requests after the other."""
    routers: dict[str, Callable[[], Router]] = {
        "even": lambda: Even(plan.replicas),
        "density": lambda: ByDensity(plan.replicas, _cost(checkpoint), densities(plan)),
    }
    with _servers(checkpoint, plan, logs, plan.policies[:1] * plan.replicas) as servers, _pool(1) as pool:
        urls, model = [server.url for server in servers], servers[0].model
        for name, trace in plan.traces.items():
            if not plan.clients and name not in report["capacity"]:
                warm_up = prompts.of(trace, 1.0, _SATURATION_REQUESTS, "saturation")
                at_once = plan.at_once * plan.replicas
                saturated = pool.submit(_saturate, Even(plan.replicas), warm_up, at_once, plan.saturate_s, urls, model)
                report["capacity"][name] = _finished_per_s(saturated.result(), plan.saturate_s)
                _say(f"{name}: at capacity {report['capacity'][name]:.2f}/s")
            for traffic in _traffic(plan, name, report["capacity"].get(name)):
                for placement in plan.placements:
                    task = _task(prompts, trace, traffic, routers[placement](), plan, placement)
                    outcomes = pool.submit(task, urls, model).result()
                    policy = f"{plan.policies[0]}, {placement}"
                    report["replays"].append(_result(policy, traffic, outcomes, servers, plan))
                    _say(_line(report["replays"][-1]))
                    yield report


def _traffic(plan: Plan, trace: str, capacity: float | None) -> Iterator[_Traffic]:
    if capacity is None:
        yield from (_Traffic(trace, clients=clients) for clients in plan.clients)
    else:
        yield from (_Traffic(trace, load=load, rate=capacity * load) for load in plan.loads)


def _task(prompts: Prompts, trace: Trace, traffic: _Traffic, router: Router, plan: Plan, placement: str = "") -> _Task:
    # Placements go to the same servers in turn: to each its own tokens, or the prefix cache would have them.
    if traffic.rate is None:
        requests = prompts.of(trace, 1.0, _SATURATION_REQUESTS, f"clients {traffic.clients} {placement}")
        return functools.partial(_saturate, router, requests, traffic.clients or 1, plan.seconds)
    count = max(_LEAST_REQUESTS, round(traffic.rate * plan.seconds))
    requests = prompts.of(trace, traffic.rate, count, f"load {traffic.load}{placement and f' {placement}'}")
    return functools.partial(_replay, router, requests)


def _on_each(pool: ProcessPoolExecutor, servers: Sequence[ServerProcess], task: _Task) -> list[list[Outcome]]:
    running = [pool.submit(task, [server.url], server.model) for server in servers]
    return [future.result() for future in running]


@contextlib.contextmanager
def _servers(checkpoint: Checkpoint, plan: Plan, logs: Path, policies: Sequence[str]) -> Iterator[list[ServerProcess]]:
    """A server for each policy, on a GPU of its own where there are GPUs, all ready."""
    with contextlib.ExitStack() as stack:
        servers = []
        for index, policy in enumerate(policies):
            batching, vllm_flags = POLICIES[policy]
            objectives = plan.settings if batching == "sparse" else []
            ours = ["--batching", batching, *objectives]
            if plan.log_steps:
                steps = logs / f"{index}-{policy}-steps.jsonl"
                steps.unlink(missing_ok=True)
                ours += ["--step-log", str(steps)]
            flags = [*ours, "--", *vllm_flags, *plan.vllm_flags]
            environment = _visible_gpu(index) if torch.cuda.is_available() else {}
            log = logs / f"{index}-{policy}.log"
            servers.append(stack.enter_context(ServerProcess(checkpoint.folder, flags, log, environment)))
        for server in servers:
            server.wait_ready()
        _say(f"{', '.join(policies)}: ready")
        yield servers


def _pool(processes: int) -> ProcessPoolExecutor:
    """Clients of their own processes: reading thousands of tokens per second keeps one busy."""
    return ProcessPoolExecutor(processes, mp_context=get_context("spawn"))


def _cost(checkpoint: Checkpoint) -> StepCost:
    """The cost model as a server starts with it."""
    config, device_type = checkpoint.config, "cuda" if torch.cuda.is_available() else "cpu"
    d_model, d_ff = config["hidden_size"], config["intermediate_size"]
    table = paths.path_table(torch.bfloat16, d_model, d_ff, device_type)
    return StepCost(
        LayerTable.of(table.timings),
        scale=layer_scale(checkpoint.n_layers, d_model, d_ff, config["vocab_size"]),
        max_sparse_rows=table.max_sparse_rows(paths.DEFAULT_DENSITY),
    )


def _visible_gpu(index: int) -> dict[str, str]:
    """Environment in which a process sees one of the GPUs that we see."""
    ours = os.environ.get("CUDA_VISIBLE_DEVICES")
    return {"CUDA_VISIBLE_DEVICES": ours.split(",")[index] if ours else str(index)}


def _saturate(
    router: Router, prompts: list[Prompt], at_once: int, seconds: float, urls: list[str], model: str
) -> list[Outcome]:
    return uvloop.run(Client(urls, model, router).saturate(prompts, at_once, seconds))


def _replay(router: Router, prompts: list[Prompt], urls: list[str], model: str) -> list[Outcome]:
    return uvloop.run(Client(urls, model, router).replay(prompts))


def _finished_per_s(outcomes: Sequence[Outcome], seconds: float) -> float:
    """Over the second half, when as many have finished as have begun.

    Raises:
        UserError: none did.
    """
    finished = sum(outcome.status == 200 and outcome.ended_s > seconds / 2 for outcome in outcomes)
    if not finished:
        raise UserError(
            f"No request was answered within {seconds:g} s. Give a longer --saturate, or a smaller --at-once."
        )
    return finished / (seconds / 2)


def _result(
    policy: str,
    traffic: _Traffic,
    outcomes: Sequence[Outcome],
    servers: Sequence[ServerProcess],
    plan: Plan,
) -> Replay:
    if not outcomes:
        raise UserError(
            f"No client had an answer within {plan.seconds:g} s. Give a longer --seconds, or fewer --clients."
        )
    metrics = _read_metrics(replay.metrics(servers[0].url))
    return {
        "policy": policy,
        "trace": traffic.trace,
        "load": traffic.load,
        "rate": traffic.rate,
        "clients": traffic.clients,
        "cost_error": metrics["cost_error"],
        "decisions": metrics["decisions"],
        "fallbacks": metrics["fallbacks"],
        "summary": summarise(outcomes, plan.objectives),
    }


def _read_metrics(text: str) -> dict[str, dict[str, float]]:
    wanted = {
        "sparse_cost_error_ratio": ("cost_error", "path"),
        "sparse_scheduler_decisions_total": ("decisions", "decision"),
        "sparse_scheduler_fallbacks_total": ("fallbacks", "reason"),
    }
    found: dict[str, dict[str, float]] = {name: {} for name, _ in wanted.values()}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in wanted:
                name, label = wanted[sample.name]
                found[name][sample.labels[label]] = sample.value
    return found


def _say(line: str) -> None:
    Console(stderr=True, highlight=False).print(f"{time.strftime('%H:%M:%S')} {line}")


def load_of(result: Replay) -> str:
    """For people: the share of capacity, or how many clients."""
    return f"{result['clients']} clients" if result["load"] is None else f"{result['load']:g}"


def _line(result: Replay) -> str:
    summary, errors = result["summary"], result["cost_error"]
    times = summary["all"]
    return (
        f"{result['trace']} at {load_of(result)}, {result['policy']}: goodput {summary['goodput']:.3f}/s ({times['good']:.0%}),"
        f" {summary['tokens_s']:.0f} tokens/s, TTFT p99 {times['ttft_p99_ms']:.0f} ms,"
        f" ITL p50 {times['itl_p50_ms']:.1f} p99 {times['itl_p99_ms']:.1f} ms, {summary['merged']:.0%} of tokens merged,"
        f" cost error {', '.join(f'{path} {error:.1%}' for path, error in errors.items())}"
    )
