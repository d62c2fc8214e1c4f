"""The scheduler's reports as metrics and in the request log."""

import asyncio
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from server.batching import BatchingTelemetry, batching_settings
from server.settings import Settings
from sparse_backend.errors import UserError
from sparse_backend.vllm_plugin.batching import SETTINGS_VARIABLE, BatchingSettings, Report, Reporter


def report(replica: int = 0, **fields: object) -> Report:
    return {
        "replica": replica,
        "decisions": {},
        "fallbacks": {},
        "errors": {},
        "running": [],
        "finished": [],
        **fields,  # type: ignore[typeddict-item]
    }


def shown(telemetry: BatchingTelemetry) -> dict[tuple[str, tuple[str, ...]], float]:
    registry = CollectorRegistry()
    registry.register(telemetry)
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {(s.name, tuple(s.labels.values())): s.value for family in families for s in family.samples}


def test_nothing_is_known_before_the_first_report() -> None:
    metrics = shown(BatchingTelemetry("sparse"))
    assert metrics["sparse_batching_info", ("sparse",)] == 1
    assert metrics["sparse_request_density_count", ()] == 0
    assert not [name for name, _ in metrics if name.startswith(("sparse_cost", "sparse_scheduler"))]


def test_replicas_add_up_and_the_worst_error_is_shown() -> None:
    telemetry = BatchingTelemetry("sparse")
    telemetry.take(report(0, decisions={"admit": 2}, errors={"sparse": 0.1, "dense": 0.2}))
    telemetry.take(report(0, decisions={"admit": 5, "chunk_cut": 1}, errors={"sparse": 0.02, "dense": 0.2}))
    telemetry.take(report(1, decisions={"admit": 3}, errors={"sparse": 0.05}, fallbacks={"clock": 1}))
    metrics = shown(telemetry)
    assert metrics["sparse_scheduler_decisions_total", ("admit",)] == 8
    assert metrics["sparse_scheduler_decisions_total", ("chunk_cut",)] == 1
    assert metrics["sparse_scheduler_fallbacks_total", ("clock",)] == 1
    assert metrics["sparse_cost_error_ratio", ("sparse",)] == 0.05
    assert metrics["sparse_cost_error_ratio", ("dense",)] == 0.2


def test_densities_of_finished_requests_are_a_histogram() -> None:
    telemetry = BatchingTelemetry("fcfs")
    for density in (0.004, 0.02, 0.021, 0.9):
        telemetry.take(report(finished=[{"id": "x", "density": density, "rows": 3}]))
    metrics = shown(telemetry)
    buckets = {labels[0]: value for (name, labels), value in metrics.items() if name == "sparse_request_density_bucket"}
    assert (buckets["0.01"], buckets["0.02"], buckets["0.03"], buckets["0.5"], buckets["+Inf"]) == (1, 2, 3, 3, 4)
    assert metrics["sparse_request_density_sum", ()] == pytest.approx(0.945)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([("cmpl-my-id-0-0a1b2c3d", 0.1, 10)], 0.1),
        ([("chatcmpl-my-id-0a1b2c3d", 0.1, 10)], 0.1),
        ([("cmpl-my-id-0-0a1b2c3d", 0.1, 30), ("cmpl-my-id-1-0a1b2c3e", 0.3, 10)], 0.15),
        ([("0_chatcmpl-my-id-0a1b2c3d", 0.1, 10), ("1_chatcmpl-my-id-0a1b2c3d", 0.2, 10)], 0.15),
        ([("cmpl-my-0-0a1b2c3d", 0.1, 10)], None),
        ([("my-id", 0.1, 10)], None),
    ],
)
def test_a_request_is_found_by_the_id_of_its_answer(
    parts: list[tuple[str, float, int]], expected: float | None
) -> None:
    telemetry = BatchingTelemetry("sparse")
    telemetry.take(report(finished=[{"id": name, "density": density, "rows": rows} for name, density, rows in parts]))
    assert telemetry.density("my-id") == (None if expected is None else pytest.approx(expected))


def test_old_requests_are_forgotten() -> None:
    telemetry = BatchingTelemetry("sparse")
    for index in range(2000):
        telemetry.take(report(finished=[{"id": f"chatcmpl-{index}-0a1b2c3d", "density": 0.1, "rows": 1}]))
    assert telemetry.density("0") is None
    assert telemetry.density("1999") == 0.1


def test_a_step_log_is_absolute_for_the_engine_and_refused_where_it_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Settings(model=tmp_path, step_log=Path("steps.jsonl"))
    assert batching_settings(settings, tmp_path).step_log == str(tmp_path / "steps.jsonl")
    with pytest.raises(UserError, match=r"--step-log missing/steps.jsonl: No such file or directory. Name a file"):
        batching_settings(Settings(model=tmp_path, step_log=Path("missing/steps.jsonl")), tmp_path)


async def test_reports_arrive_over_the_socket_the_settings_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(model=tmp_path, batching="sparse", itl_slo_ms=20)
    monkeypatch.setenv(SETTINGS_VARIABLE, batching_settings(settings, tmp_path).model_dump_json())
    received = BatchingSettings.from_environment()
    assert (received.policy, received.itl_slo_ms, received.ttft_slo_ms) == ("sparse", 20, None)
    assert received.report_to is not None
    reporter = Reporter(received.report_to)
    reporter.send(report(decisions={"admit": 1}))  # nobody listens yet: dropped
    telemetry = BatchingTelemetry("sparse")
    telemetry.listen(tmp_path)
    for count in (2, 3):
        reporter.send(report(decisions={"admit": count}))
    await asyncio.sleep(0.05)
    assert shown(telemetry)["sparse_scheduler_decisions_total", ("admit",)] == 3
    telemetry.close()
    reporter.close()
