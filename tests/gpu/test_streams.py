"""The same bits every time: repeated, under load, on two streams at once, from CUDA graphs and under torch.compile."""

import pytest
import torch

from sparse_backend.ffn import counters, op
from tests.ffn.layers import ALL_DENSE, ALL_SPARSE, Case, poison
from tests.gpu.device import NEEDS_GPU, both_dtypes, both_paths, padding

pytestmark = NEEDS_GPU

SHAPES = [(40, 264), (4096, 11008)]


@both_paths
@both_dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_input_same_bits(shape: tuple[int, int], dtype: torch.dtype, path: int) -> None:
    case = Case.random(33, *shape, dtype, density=0.107, device="cuda")
    for rows in (1, 2, 7, 8, 9, 16, 32, 33):
        some = case.first_rows(rows)
        first, counted = some.run(path)
        for _ in range(20):
            y, again = some.run(path)
            assert torch.equal(y, first)
            assert torch.equal(again, counted)


@both_paths
@both_dtypes
def test_same_bits_under_load(dtype: torch.dtype, path: int) -> None:
    """Another stream keeps the GPU busy, so that blocks start late and in another order."""
    case = Case.random(16, 4096, 11008, dtype, density=0.107, device="cuda")
    first, counted = case.run(path)
    load = torch.randn(4096, 4096, dtype=dtype, device="cuda")
    torch.cuda.synchronize()
    busy = torch.cuda.Stream()
    with torch.cuda.stream(busy):
        for _ in range(200):
            load @ load
    results = [case.run(path) for _ in range(20)]
    assert not busy.query(), "the load ended before the calls did: it tested nothing"
    for y, again in results:
        assert torch.equal(y, first)
        assert torch.equal(again, counted)
    torch.cuda.synchronize()


@both_paths
def test_two_streams_at_once(path: int) -> None:
    cases = [Case.random(8, 4096, 11008, torch.bfloat16, density=0.107, seed=seed, device="cuda") for seed in (1, 2)]
    expected = [case.run(path) for case in cases]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    results: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[], []]
    for _ in range(30):
        for case, stream, into in zip(cases, streams, results, strict=True):
            with torch.cuda.stream(stream):
                into.append(case.run(path))
    torch.cuda.synchronize()
    for (y, counted), several in zip(expected, results, strict=True):
        for again, counted_again in several:
            assert torch.equal(again, y)
            assert torch.equal(counted_again, counted)


@both_paths
@both_dtypes
def test_a_replayed_graph_follows_its_inputs(dtype: torch.dtype, path: int) -> None:
    for rows in (1, 8, 16, 32):
        case = Case.random(rows, 1536, 3840, dtype, density=0.107, device="cuda")
        x, is_padding, counted = torch.zeros_like(case.x), padding(rows, []), counters.new_counters("cuda")
        arguments = (x, case.gate_up, case.down_t, case.threshold, counted, path, is_padding)
        op.sparse_gated_ffn(*arguments)  # warm-up, outside the graph
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = op.sparse_gated_ffn(*arguments)
        counted.zero_()
        expected = counters.new_counters("cuda")
        for seed, padded in enumerate([[], [rows - 1], list(range(rows)), list(range(rows // 2)), []]):
            x.copy_(Case.random(rows, 1536, 8, dtype, seed=10 + seed, device="cuda").x)
            is_padding.copy_(padding(rows, padded))
            y.fill_(float("nan"))
            graph.replay()
            eager, once = Case(x, case.gate_up, case.down_t, case.threshold).run(path, is_padding)
            assert torch.equal(y, eager)
            expected += once
            assert torch.equal(counted, expected)


@both_dtypes
def test_layers_in_a_row(dtype: torch.dtype) -> None:
    """Each call starts while the one before runs out, and they share scratch memory: nothing may be touched too early."""
    layers = [Case.random(16, 4096, 11008, dtype, density=0.2, seed=seed, device="cuda") for seed in range(4)]
    sequence = [(layer, path) for layer in layers for path in (ALL_SPARSE, ALL_SPARSE, ALL_DENSE)]

    def chain(x: torch.Tensor, counted: torch.Tensor, wait: bool = False) -> torch.Tensor:
        for layer, path in sequence:
            y = op.sparse_gated_ffn(x, layer.gate_up, layer.down_t, 0.0, counted, path)
            if wait:
                torch.cuda.synchronize()
                poison(y)
            # Two out of three layers follow each other directly, the third after a kernel of torch's.
            x = y if path == ALL_SPARSE else torch.nn.functional.rms_norm(y, (4096,))
        return x

    for rows in (1, 8, 16):
        x = layers[0].x[:rows].clone()
        once, counted = counters.new_counters("cuda"), counters.new_counters("cuda")
        expected = chain(x, once, wait=True)
        assert expected.isfinite().all()
        chain(x, counted)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = chain(x, counted)
        counted.zero_()
        for replay in range(1, 31):
            y.fill_(float("nan"))
            graph.replay()
            assert torch.equal(y, expected), (rows, replay)
        assert torch.equal(counted, 30 * once)
        assert all(torch.equal(chain(x, counted), expected) for _ in range(10))


@both_paths
def test_compiled_graph_keeps_counting(path: int) -> None:
    case = Case.random(4, 64, 128, torch.bfloat16, device="cuda")

    def step(x: torch.Tensor, counted: torch.Tensor, is_padding: torch.Tensor) -> torch.Tensor:
        return op.sparse_gated_ffn(x * 1.0, case.gate_up, case.down_t, 0.0, counted, path, is_padding) + x

    counted = counters.new_counters("cuda")
    is_padding = padding(4, [1])
    compiled = torch.compile(step, fullgraph=True)
    for _ in range(3):
        y = compiled(case.x, counted, is_padding)
    expected, once = case.run(path, is_padding)
    assert torch.equal(y, expected + case.x)
    assert torch.equal(counted, 3 * once)


@both_dtypes
@both_paths
def test_opcheck(dtype: torch.dtype, path: int) -> None:
    case = Case.random(3, 64, 128, dtype, device="cuda")
    arguments = (case.x, case.gate_up, case.down_t, 0.01, counters.new_counters("cuda"), path)
    torch.library.opcheck(torch.ops.prosparse.sparse_gated_ffn.default, arguments)
    torch.library.opcheck(torch.ops.prosparse.sparse_gated_ffn.default, (*arguments, padding(3, [1])))
    torch.library.opcheck(torch.ops.prosparse.sparse_gate.default, (case.x, case.gate_up))


@both_paths
def test_the_stream_is_the_callers(path: int) -> None:
    """A call waits for what its own stream is doing, and for nothing else."""
    case = Case.random(4, 64, 128, torch.bfloat16, device="cuda")
    x = torch.zeros_like(case.x)
    counted = counters.new_counters("cuda")
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()

    def call() -> torch.Tensor:
        x.copy_(case.x)
        return op.sparse_gated_ffn(x, case.gate_up, case.down_t, 0.0, counted, path)

    with torch.cuda.stream(stream):
        call()  # what is only done once, such as taking memory, may wait
        stream.synchronize()
        x.zero_()
        torch.cuda._sleep(50_000_000)  # clock cycles
        y = call()
    assert torch.cuda.current_stream().query()
    assert not stream.query()
    stream.synchronize()
    assert torch.equal(y, case.run(path)[0])
