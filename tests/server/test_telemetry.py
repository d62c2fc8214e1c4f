import asyncio

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from server import telemetry
from server.telemetry import MIN_INTERVAL, WINDOW, SparsityTelemetry

D_FF = 100


def snapshot(rows, active, union, steps, *, dense_rows=0, layers=1):
    """What one worker answers: ``layers`` equal layers, the counts on the sparse path, dense rows fully active."""
    paths = {
        "sparse": {"rows": rows, "active": active, "union": union, "steps": steps},
        "dense": {
            "rows": dense_rows,
            "active": dense_rows * D_FF,
            "union": D_FF * (dense_rows > 0),
            "steps": int(dense_rows > 0),
        },
    }
    return [
        {
            "kernel": {"name": "cpu", "isa": "avx2", "reason": ""},
            "layers": [
                {
                    **{"layer": str(index), "d_ff": D_FF, "neuron_bytes": 32, "max_sparse_rows": 4},
                    **{"dense_reason": "", "paths": paths},
                }
                for index in range(layers)
            ],
        }
    ]


class Engine:
    """Answers what it is told to, when it is told to; time is ours too."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.answer = snapshot(0, 0, 0, 0)
        self.hung = None
        self.asked = 0

    def clock(self) -> float:
        return self.now

    async def ask(self):
        self.asked += 1
        if self.hung is not None:
            await self.hung.wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def samples(collector) -> dict:
    """{(name, *label values): value} of an exposition round trip, which also checks names and types."""
    registry = CollectorRegistry()
    registry.register(collector)
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}


@pytest.fixture
def engine():
    return Engine()


@pytest.fixture
async def live(engine):
    live = SparsityTelemetry([0.25], clock=engine.clock)
    await live.start(engine.ask)
    return live


async def scrape(live, engine, seconds, answer=None):
    engine.now += seconds
    if answer is not None:
        engine.answer = answer
    await live.refresh()
    return samples(live)


def test_before_the_engine_is_up_only_what_is_known_is_shown():
    shown = samples(SparsityTelemetry([0.25, 0.5]))
    assert shown == {
        ("sparse_snapshot_seconds_count",): 0,
        ("sparse_snapshot_seconds_sum",): 0,
        ("sparse_snapshot_failures_total",): 0,
        ("sparse_ffn_expected_density", "0"): 0.25,
        ("sparse_ffn_expected_density", "1"): 0.5,
    }


async def test_counters_and_info(live, engine):
    shown = await scrape(live, engine, 15, snapshot(10, 120, 90, 5, dense_rows=2))
    assert live.kernel["isa"] == "avx2"
    assert shown["sparse_kernel_info", "avx2", "cpu", ""] == 1
    assert shown["sparse_ffn_neurons", "0"] == D_FF
    assert shown["sparse_ffn_neuron_bytes", "0"] == 32
    assert shown["sparse_ffn_max_sparse_rows", "0"] == 4
    assert shown["sparse_ffn_expected_density", "0"] == 0.25
    assert shown["sparse_ffn_rows_total", "0", "sparse"] == 10
    assert shown["sparse_ffn_rows_total", "0", "dense"] == 2
    assert shown["sparse_ffn_active_neurons_total", "0", "sparse"] == 120
    assert shown["sparse_ffn_union_neurons_total", "0", "sparse"] == 90
    assert shown["sparse_ffn_steps_total", "0", "sparse"] == 5
    assert shown["sparse_snapshot_seconds_count",] == 2


async def test_density_is_a_ratio_of_differences_over_both_paths(live, engine):
    await scrape(live, engine, 15, snapshot(10, 120, 90, 5))
    shown = await scrape(live, engine, 15, snapshot(30, 620, 390, 10, dense_rows=5))
    # 20 sparse rows with 500 active and 5 dense rows with all of them; 5 sparse steps and a dense one.
    assert shown["sparse_ffn_density", "0"] == pytest.approx((500 + 5 * D_FF) / (25 * D_FF))
    assert shown["sparse_ffn_union_density", "0"] == pytest.approx((300 + D_FF) / (6 * D_FF))


async def test_a_layer_at_rest_has_no_density(live, engine):
    shown = await scrape(live, engine, 15, snapshot(10, 120, 90, 5))
    assert ("sparse_ffn_density", "0") in shown
    shown = await scrape(live, engine, 15)
    assert ("sparse_ffn_density", "0") not in shown
    assert ("sparse_ffn_union_density", "0") not in shown
    assert shown["sparse_ffn_rows_total", "0", "sparse"] == 10


async def test_scrapes_faster_than_the_window_see_the_whole_window(live, engine):
    for second in range(1, 31):
        # Density 0.1 for fifteen seconds, then 0.5.
        active = 10 * min(second, 15) + 50 * max(second - 15, 0)
        shown = await scrape(live, engine, 1, snapshot(second, active, second, second))
        if second == 22:
            assert shown["sparse_ffn_density", "0"] == pytest.approx((8 * 0.1 + 7 * 0.5) / 15)
    assert shown["sparse_ffn_density", "0"] == pytest.approx(0.5)
    assert len(live._snapshots) <= WINDOW + 1


async def test_slow_scrapes_use_the_scrape_before(live, engine):
    await scrape(live, engine, 60, snapshot(10, 100, 10, 10))
    shown = await scrape(live, engine, 60, snapshot(20, 600, 20, 20))
    assert shown["sparse_ffn_density", "0"] == pytest.approx(0.5)


async def test_replicas_add_up(engine):
    engine.answer = snapshot(10, 120, 90, 5) + snapshot(10, 80, 10, 5)
    live = SparsityTelemetry(clock=engine.clock)
    await live.start(engine.ask)
    shown = samples(live)
    assert shown["sparse_ffn_neurons", "0"] == D_FF
    assert shown["sparse_ffn_rows_total", "0", "sparse"] == 20
    assert shown["sparse_ffn_active_neurons_total", "0", "sparse"] == 200


async def test_layers_that_vllm_computes_are_named_with_the_reason(engine):
    engine.answer = snapshot(10, 120, 90, 5, layers=3)
    for layer, reason in zip(engine.answer[0]["layers"], ("lora", "", "quantization"), strict=True):
        layer["dense_reason"] = reason
    live = SparsityTelemetry(clock=engine.clock)
    await live.start(engine.ask)
    fallbacks = {key: value for key, value in samples(live).items() if key[0] == "sparse_ffn_dense_fallback"}
    assert fallbacks == {
        ("sparse_ffn_dense_fallback", "0", "lora"): 1,
        ("sparse_ffn_dense_fallback", "2", "quantization"): 1,
    }


async def test_the_engine_is_asked_at_most_once_per_interval(live, engine):
    engine.now += MIN_INTERVAL
    await asyncio.gather(*(live.refresh() for _ in range(5)))
    await live.refresh()
    assert engine.asked == 2
    engine.now += MIN_INTERVAL
    await live.refresh()
    assert engine.asked == 3


async def test_a_hung_engine_hangs_no_scrape(live, engine, monkeypatch):
    monkeypatch.setattr(telemetry, "TIMEOUT", 0.01)
    await scrape(live, engine, 1, snapshot(10, 120, 90, 5))
    engine.hung = asyncio.Event()
    shown = await scrape(live, engine, 1)
    assert shown["sparse_snapshot_failures_total",] == 1
    assert shown["sparse_ffn_rows_total", "0", "sparse"] == 10
    shown = await scrape(live, engine, 30)
    assert shown["sparse_snapshot_failures_total",] == 2
    assert ("sparse_ffn_density", "0") not in shown
    # One question was sent, not one per scrape; its answer is taken when it comes.
    assert engine.asked == 3
    engine.answer = snapshot(11, 130, 100, 6)
    engine.hung.set()
    await live.refresh()
    assert samples(live)["sparse_ffn_rows_total", "0", "sparse"] == 11


async def test_an_engine_that_raises_is_a_failure_and_no_more(live, engine, caplog):
    shown = await scrape(live, engine, 1, RuntimeError("gone"))
    assert shown["sparse_snapshot_failures_total",] == 1
    assert "could not be read" in caplog.text
    shown = await scrape(live, engine, 1, snapshot(10, 120, 90, 5))
    assert shown["sparse_ffn_rows_total", "0", "sparse"] == 10


async def test_a_new_engine_begins_anew(live, engine):
    await scrape(live, engine, 15, snapshot(1000, 12000, 9000, 500))
    live.stop()
    shown = await scrape(live, engine, 15, RuntimeError("gone"))
    assert shown["sparse_snapshot_failures_total",] == 0, "there is nobody to ask"
    assert shown["sparse_ffn_rows_total", "0", "sparse"] == 1000
    engine.answer = snapshot(0, 0, 0, 0)
    await live.start(engine.ask)
    shown = await scrape(live, engine, 15, snapshot(10, 120, 90, 5))
    assert shown["sparse_ffn_rows_total", "0", "sparse"] == 10
    assert shown["sparse_ffn_density", "0"] == pytest.approx(120 / (10 * D_FF))


async def test_a_scrape_that_is_slow_to_fail_counts_once(live, engine, monkeypatch):
    monkeypatch.setattr(telemetry, "TIMEOUT", 0.01)
    engine.hung = asyncio.Event()
    await scrape(live, engine, 1, RuntimeError("gone"))
    engine.hung.set()
    await asyncio.sleep(0.01)
    assert samples(live)["sparse_snapshot_failures_total",] == 1


async def test_start_fails_if_the_first_snapshot_does(engine):
    engine.answer = RuntimeError("no such method")
    with pytest.raises(RuntimeError, match="no such method"):
        await SparsityTelemetry(clock=engine.clock).start(engine.ask)
