"""The op on a GPU, where for now the PyTorch reference computes it. Run with `make test-gpu` on a GPU machine."""

import pytest
import torch

from sparse_backend.ffn import counters, sparse_gated_ffn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

THRESHOLD = 0.25


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_gpu_and_cpu_agree_also_when_replayed_from_a_graph(dtype, tolerance, rows, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    torch.manual_seed(rows)
    x, gate_up, down_t = (torch.randn(shape).to(dtype) for shape in ((rows, 64), (2 * 192, 64), (192, 64)))
    on_cpu = counters.new_counters(torch.device("cpu"))
    expected = sparse_gated_ffn(x, gate_up / 8, down_t / 14, THRESHOLD, on_cpu, 0).float()

    on_gpu = counters.new_counters(torch.device("cuda"))
    arguments = (x.cuda(), (gate_up / 8).cuda(), (down_t / 14).cuda(), THRESHOLD, on_gpu, 0)
    sparse_gated_ffn(*arguments)  # warm-up, outside the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = sparse_gated_ffn(*arguments)
    on_gpu.zero_()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()

    assert torch.linalg.vector_norm(y.cpu().float() - expected) <= tolerance * torch.linalg.vector_norm(expected)
    counted = on_gpu.cpu() / 3
    # Gates within rounding of the threshold may fall on either side.
    assert (counted - on_cpu).abs().max() <= 0.02 * on_cpu[1, counters.ACTIVE]
    assert counted[1, counters.ROWS] == rows
    assert counted[1, counters.STEPS] == 1
