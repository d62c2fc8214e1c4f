"""Our scheduler over vLLM's, without an engine: see fake_engine."""

import dataclasses
import functools
import itertools
import json
import logging
import operator
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.config import VllmConfig
from vllm.v1.request import Request

from sparse_backend.vllm_plugin.batching import BatchingSettings
from sparse_backend.vllm_plugin.cost import LayerTable, StepCost, StepShape
from sparse_backend.vllm_plugin.plan import Planner, StepPlan
from tests.vllm_plugin.fake_engine import MOST_TOKENS, FakeEngine, engine_config

MOST_REQUESTS = 8

requests = st.lists(
    st.tuples(st.integers(0, 6), st.integers(1, 300), st.integers(1, 30), st.floats(0.0, 1.0)), min_size=1, max_size=14
)
"""Steps before it comes, prompt tokens, output tokens, density."""

policies = st.builds(
    BatchingSettings,
    policy=st.sampled_from(["fcfs", "sparse"]),
    itl_slo_ms=st.none() | st.floats(0.1, 50),
    ttft_slo_ms=st.none() | st.floats(1, 500),
    max_unfairness_ms=st.sampled_from([0.0, 20.0, 1000.0]),
)


@pytest.fixture(scope="module")
def config() -> VllmConfig:
    return engine_config()


def run_through(engine: FakeEngine, arrivals: list[tuple[int, int, int, float]], depth: int) -> None:
    """Let requests come step by step, then wait for all of them."""
    for index, (steps, prompt, output, density) in enumerate(arrivals):
        for _ in range(steps):
            if engine.scheduler.has_unfinished_requests():
                engine.step(depth)
        engine.add(str(index), prompt, output, density)
    engine.drain(depth=depth)


@settings(max_examples=60, deadline=None)
@given(
    arrivals=requests,
    policy=policies,
    depth=st.integers(1, 2),
    slow=st.floats(1e-6, 1e-3),
    beside=st.sampled_from([0.0, 5e-3]),
    blocks=st.integers(45, 200),
)
def test_every_request_is_finished_within_vllms_limits(
    config: VllmConfig,
    arrivals: list[tuple[int, int, int, float]],
    policy: BatchingSettings,
    depth: int,
    slow: float,
    beside: float,
    blocks: int,
) -> None:
    engine = FakeEngine(config, policy, blocks, seconds=lambda tokens: 1e-3 + slow * tokens, beside=beside)
    run_through(engine, arrivals, depth)
    assert engine.finished_at.keys() == {str(index) for index in range(len(arrivals))}
    for step in engine.steps:
        assert step.total_num_scheduled_tokens <= MOST_TOKENS
        assert len(step.num_scheduled_tokens) <= MOST_REQUESTS
    assert not engine.scheduler.fallbacks


@settings(max_examples=25, deadline=None)
@given(arrivals=requests, depth=st.integers(1, 2))
def test_without_an_objective_steps_are_those_of_first_come_first_served(
    config: VllmConfig, arrivals: list[tuple[int, int, int, float]], depth: int
) -> None:
    ours, theirs = (FakeEngine(config, BatchingSettings(policy=policy)) for policy in ("sparse", "fcfs"))
    for engine in (ours, theirs):
        run_through(engine, arrivals, depth)
    assert [step.num_scheduled_tokens for step in ours.steps] == [step.num_scheduled_tokens for step in theirs.steps]


@settings(max_examples=25, deadline=None)
@given(arrivals=requests, depth=st.integers(1, 2))
def test_without_counters_steps_are_those_of_first_come_first_served(
    config: VllmConfig, arrivals: list[tuple[int, int, int, float]], depth: int
) -> None:
    ours = FakeEngine(config, BatchingSettings(policy="sparse", itl_slo_ms=3), counting=False)
    theirs = FakeEngine(config, BatchingSettings(policy="fcfs"))
    for engine in (ours, theirs):
        run_through(engine, arrivals, depth)
    assert [step.num_scheduled_tokens for step in ours.steps] == [step.num_scheduled_tokens for step in theirs.steps]
    assert ours.scheduler.fallbacks == {"counters": 1}


def traffic(engine: FakeEngine, steps: int) -> list[float]:
    """Decodes go on while prompts come; returns the milliseconds of the steps that a decode waited for."""
    for index in range(3):
        engine.add(f"decode {index}", 20, 480)
    times = []
    for index in range(steps):
        if len(engine.scheduler.waiting) == 0 and index % 4 == 0:
            engine.add(f"prompt {index}", 250, 1, 0.5)
        began = engine.now
        engine.step()
        times.append(1e3 * (engine.now - began))
    return times


def test_pieces_of_prompts_are_as_large_as_the_objective_allows(config: VllmConfig) -> None:
    # A step takes 2 ms and 0.1 ms per token: 95 % of the objective is room for 80 tokens, and vLLM would take 128.
    engine = FakeEngine(config, BatchingSettings(policy="sparse", itl_slo_ms=10.8))
    times = traffic(engine, 200)
    assert 9 < max(times[40:]) < 0.95 * 10.8
    assert engine.scheduler.decisions["chunk_cut"] > 40
    whole = FakeEngine(config, BatchingSettings(policy="fcfs", itl_slo_ms=10.8))
    assert max(traffic(whole, 200)[40:]) > 12


def test_steps_that_only_decode_have_vllms_own_limit_again_and_are_not_planned(
    config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = FakeEngine(config, BatchingSettings(policy="sparse", itl_slo_ms=10.8))
    traffic(engine, 60)
    engine.add("in pieces", 250, 1)
    engine.step()
    assert engine.scheduler.max_num_scheduled_tokens < MOST_TOKENS
    while "in pieces" not in engine.finished_at:
        engine.step()
    monkeypatch.setattr(Planner, "plan", lambda *_, **__: pytest.fail("there is nothing to plan"))
    engine.step()
    assert engine.scheduler.running
    assert engine.scheduler.max_num_scheduled_tokens == MOST_TOKENS


def test_objectives_out_of_reach_leave_prompts_a_share(config: VllmConfig) -> None:
    engine = FakeEngine(config, BatchingSettings(policy="sparse", itl_slo_ms=0.5))
    times = traffic(engine, 300)
    assert sum(name.startswith("prompt") for name in engine.finished_at) > 20
    assert max(times[60:]) < 2 + 0.1 * (MOST_TOKENS / 2 + 4)


def test_with_an_itl_objective_out_of_reach_prompts_keep_theirs(config: VllmConfig) -> None:
    first_tokens = {}
    for ttft in (None, 45.0):
        engine = FakeEngine(config, BatchingSettings(policy="sparse", itl_slo_ms=0.5, ttft_slo_ms=ttft))
        traffic(engine, 150)
        engine.add("late", 350, 1)
        began = engine.now
        while "late" not in engine.finished_at:
            engine.step()
        first_tokens[ttft] = 1e3 * (engine.finished_at["late"] - began)
    assert first_tokens[45.0] < first_tokens[None]


def test_objectives_that_one_row_misses_are_said_at_start(config: VllmConfig, caplog: pytest.LogCaptureFixture) -> None:
    table = [(rows, 1 - 0.9**rows, 3000.0 + rows) for rows in (1, 2, 4)]
    for policy, said in (("sparse", True), ("fcfs", False)):
        caplog.clear()
        FakeEngine(config, BatchingSettings(policy=policy, itl_slo_ms=1, ttft_slo_ms=100), sparse_us=table)
        assert any("--itl-slo-ms 1 cannot be met" in message for message in caplog.messages) == said
        assert not any("--ttft-slo-ms" in message for message in caplog.messages)


# ---- faults ------------------------------------------------------------------------------------------------------------------


def budgets(engine: FakeEngine, steps: int) -> list[int]:
    """Tokens that steps were limited to, prompts always waiting."""
    given = []
    for index in range(steps):
        if len(engine.scheduler.waiting) < 2:
            engine.add(f"more {engine.now} {index}", 250, 1, 0.5)
        engine.step()
        given.append(engine.scheduler.max_num_scheduled_tokens)
    return given


def lose_counters(engine: FakeEngine) -> None:
    engine.counting = False
    budgets(engine, 3)
    engine.counting = True


def restart_worker(engine: FakeEngine) -> None:
    engine.counters.zero_()
    engine.row_active.zero_()
    engine.writer.reset()


def jump_back(engine: FakeEngine) -> None:
    step = engine.seconds
    engine.seconds = lambda tokens: -5.0
    engine.step()
    engine.seconds = step


def jump_ahead(engine: FakeEngine) -> None:
    step = engine.seconds
    engine.seconds = lambda tokens: 3600.0
    engine.step()
    engine.seconds = step


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(lose_counters, "counters"), (restart_worker, "counters"), (jump_back, "clock"), (jump_ahead, "clock")],
)
def test_a_fault_means_first_come_first_served_for_a_while_and_one_warning(
    config: VllmConfig, fault: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = FakeEngine(config, BatchingSettings(policy="sparse", itl_slo_ms=8))
    for index in range(3):
        engine.add(f"decode {index}", 20, 480)
    assert max(budgets(engine, 60)[40:]) < MOST_TOKENS
    for _ in range(2):
        fault(engine)
        after = budgets(engine, 60)
        assert set(after[2:20]) == {MOST_TOKENS}
        assert max(after[50:]) < MOST_TOKENS
    assert engine.scheduler.fallbacks.keys() == {reason}
    with_reason = [record for record in caplog.records if "first come, first served" in record.getMessage()]
    assert [record.levelno for record in with_reason] == [logging.WARNING]


def test_densities_are_those_of_the_requests_whatever_shares_a_step(config: VllmConfig) -> None:
    for depth in (1, 2):
        engine = FakeEngine(config, BatchingSettings(policy="sparse", itl_slo_ms=5))
        reports: list[Any] = []
        engine.scheduler._reporter = type("Reports", (), {"send": staticmethod(reports.append)})()
        for index in range(12):
            engine.add(str(index), 10 + 25 * index, 3 + 2 * index, index / 20)
        engine.drain(depth=depth)
        finished = {request["id"]: request for report in reports for request in report["finished"]}
        assert len(finished) == 12
        for index in range(12):
            assert finished[str(index)]["density"] == pytest.approx(index / 20)
            # The last token is not computed further; with steps under way ahead, one row more may have been.
            assert finished[str(index)]["rows"] == 10 + 25 * index + 3 + 2 * index - 1


def test_the_step_log_has_each_step_as_it_was_and_as_it_was_predicted(config: VllmConfig, tmp_path: Path) -> None:
    log = tmp_path / "steps.jsonl"
    engine = FakeEngine(config, BatchingSettings(step_log=str(log)), seconds=lambda tokens: 1e-3 * tokens)
    run_through(engine, [(0, 40, 3, 0.1), (1, 9, 3, 0.1)], depth=1)
    engine.scheduler.shutdown()
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    assert [step["rows"] for step in steps] == [output.total_num_scheduled_tokens for output in engine.steps]
    assert [step["seconds"] for step in steps] == pytest.approx([1e-3 * step["rows"] for step in steps])
    assert [(step["prefill_tokens"], step["path"]) for step in steps[:2]] == [(40, "dense"), (9, "dense")]
    assert [step["after_idle"] for step in steps[:2]] == [True, False]
    assert [step["after_prefill"] for step in steps[:3]] == [False, True, True]
    # Nothing has been learnt before the first.
    first = StepShape(**{field.name: steps[0][field.name] for field in dataclasses.fields(StepShape)})
    assert steps[0]["predicted"] == StepCost(LayerTable([], []), scale=1, max_sparse_rows=4).seconds(first)


@pytest.mark.parametrize("counting", [True, False])
def test_a_step_took_what_it_took_on_the_device_whenever_the_host_learnt_of_it(
    config: VllmConfig, tmp_path: Path, counting: bool
) -> None:
    log = tmp_path / "steps.jsonl"
    engine = FakeEngine(
        config,
        BatchingSettings(step_log=str(log)),
        counting=counting,
        seconds=lambda tokens: 1e-3 * tokens,
        host_seconds=lambda tokens: 0.01,
    )
    run_through(engine, [(0, 40, 3, 0.1), (1, 9, 3, 0.1)], depth=2)
    engine.scheduler.shutdown()
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    assert [step["after_idle"] for step in steps[:3]] == [True, False, False]
    for step in steps[1:]:
        assert step["seconds"] == pytest.approx(1e-3 * step["rows"] if counting else 0.01)


def test_steps_go_on_where_the_step_log_cannot_be_written(
    config: VllmConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for log in (tmp_path / "missing" / "steps", Path("/dev/full")):
        engine = FakeEngine(config, BatchingSettings(step_log=str(log)))
        run_through(engine, [(0, 40, 3, 0.1)], depth=1)
        engine.scheduler.shutdown()
        assert f"--step-log {log}" in caplog.text
    assert len([record for record in caplog.records if "--step-log" in record.message]) == 2


def test_a_step_after_a_pause_is_not_one_after_a_prompt(config: VllmConfig, tmp_path: Path) -> None:
    log = tmp_path / "steps.jsonl"
    engine = FakeEngine(config, BatchingSettings(step_log=str(log)))
    for name in ("one", "two"):
        engine.add(name, 40, 1)
        engine.drain()
    engine.scheduler.shutdown()
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(step["prefill_tokens"], step["after_idle"], step["after_prefill"]) for step in steps] == [
        (40, True, False),
        (40, True, False),
    ]


# ---- prompts by themselves ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("itl", [None, 30.0])
def test_prompts_have_steps_of_their_own_where_that_is_faster(config: VllmConfig, itl: float | None) -> None:
    engines = {}
    for policy in ("fcfs", "sparse"):
        settings = BatchingSettings(policy=policy, itl_slo_ms=itl)
        engine = engines[policy] = FakeEngine(
            config, settings, seconds=lambda tokens: 1e-3 + 2e-5 * tokens, beside=2e-3
        )
        times = traffic(engine, 500)
    held, whole = engines["sparse"], engines["fcfs"]
    assert held.scheduler.decisions["hold_back"] > 100
    assert "hold_back" not in whole.scheduler.decisions
    assert len(held.finished_at) / (held.now - 1000) > 1.2 * len(whole.finished_at) / (whole.now - 1000)
    # Of two steps in a row at least one carries the decodes; they go on until the 480th token.
    carried = ["decode 1" in step.num_scheduled_tokens for step in held.steps[:480]]
    assert all(map(operator.or_, carried, carried[1:]))
    if itl is not None:
        assert max(map(operator.add, times[200:], times[201:])) < itl


def test_the_planner_is_told_what_the_step_before_was(config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine(
        config, BatchingSettings(policy="sparse"), seconds=lambda tokens: 1e-3 + 2e-5 * tokens, beside=2e-3
    )
    plan, told = Planner.plan, []

    def listen(self: Planner, *args: Any, **kwargs: Any) -> StepPlan:
        assert kwargs.pop("may_hold_back")
        told.append((len(engine.steps), kwargs))
        return plan(self, *args, may_hold_back=True, **kwargs)

    monkeypatch.setattr(Planner, "plan", listen)
    traffic(engine, 300)
    planned = [steps for steps, _ in told]
    assert planned == sorted(set(planned))
    for index, step in enumerate(engine.steps):
        # Those that only decode need not be.
        assert index in planned or set(step.num_scheduled_tokens.values()) == {1}
    seen = set()
    for steps, kwargs in told[1:]:
        before = engine.steps[steps - 1]
        has_prompts = any(tokens > 1 for tokens in before.num_scheduled_tokens.values())
        # It is not done yet.
        held_back = "decode 0" not in before.num_scheduled_tokens
        assert kwargs == {"after_prefill": has_prompts, "held_back": held_back}
        seen.add((has_prompts, held_back))
    assert seen == {(True, False), (True, True), (False, False)}


def test_decodes_are_not_held_back_for_prompts_that_do_not_fit(config: VllmConfig) -> None:
    def engine(blocks: int) -> FakeEngine:
        settings = BatchingSettings(policy="sparse")
        return FakeEngine(config, settings, blocks, seconds=lambda tokens: 1e-3 + 2e-5 * tokens, beside=2e-3)

    # Three decodes keep 3 x 32 blocks in the end; a prompt of 250 tokens takes 16.
    for blocks, held_back in ((200, True), (60, True), (45, False)):
        tight = engine(blocks)
        traffic(tight, 400)
        assert bool(tight.scheduler.decisions["hold_back"]) == held_back
        assert sum(not step.total_num_scheduled_tokens for step in tight.steps) <= 1
        tight.drain()


def test_where_holding_back_was_in_vain_it_is_not_tried_again_at_once(
    config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = FakeEngine(
        config, BatchingSettings(policy="sparse"), seconds=lambda tokens: 1e-3 + 2e-5 * tokens, beside=2e-3
    )
    traffic(engine, 200)
    before = engine.scheduler.decisions["hold_back"]
    # Something that we do not look at keeps prompts out.
    engine.add("waits", 250, 1)
    monkeypatch.setattr(engine.scheduler.kv_cache_manager, "allocate_slots", refuse_prompts(engine))
    for _ in range(66):
        engine.step()
    assert 1 <= engine.scheduler.decisions["hold_back"] - before <= 3
    monkeypatch.undo()
    budgets(engine, 100)
    assert engine.scheduler.decisions["hold_back"] > before + 10


def test_a_step_after_one_without_decodes_has_nothing_else(config: VllmConfig) -> None:
    engine = FakeEngine(
        config, BatchingSettings(policy="sparse"), seconds=lambda tokens: 1e-3 + 2e-5 * tokens, beside=2e-3
    )
    prompts: dict[str, int] = {}
    # First it sees decodes alone, on both paths.
    for index in range(8):
        engine.add(f"decode {index}", 20, 480 if index < 3 else 80)
    for _ in range(160):
        engine.step(depth=2)
    for index in range(250):
        # Answers of one token: those whose prompt the step under way reads need no further one.
        if len(engine.scheduler.waiting) < 3:
            prompts[f"prompt {index}"] = 50 + index % 90
            engine.add(f"prompt {index}", 50 + index % 90, 1, 0.5)
        engine.step(depth=2)
    assert engine.scheduler.decisions["hold_back"] > 50
    read: Counter[str] = Counter()
    for before, after in itertools.pairwise(engine.steps):
        read.update(before.num_scheduled_tokens)
        if "decode 0" not in before.num_scheduled_tokens:
            assert all(read[name] >= prompts.get(name, 20) for name in after.num_scheduled_tokens)


def test_nothing_is_held_back_for_prompts_that_vllm_defers(config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine(
        config, BatchingSettings(policy="sparse"), seconds=lambda tokens: 1e-3 + 2e-5 * tokens, beside=2e-3
    )
    traffic(engine, 200)
    before = engine.scheduler.decisions["hold_back"]
    monkeypatch.setattr(engine.scheduler, "schedule", functools.partial(engine.scheduler.schedule, True))
    budgets(engine, 50)
    assert engine.scheduler.decisions["hold_back"] == before
    assert all(step.total_num_scheduled_tokens for step in engine.steps)


def refuse_prompts(engine: FakeEngine) -> Any:
    allocate = engine.scheduler.kv_cache_manager.allocate_slots

    def allocate_slots(request: Request, tokens: int, *args: Any, **kwargs: Any) -> Any:
        return None if request in engine.scheduler.waiting else allocate(request, tokens, *args, **kwargs)

    return allocate_slots
