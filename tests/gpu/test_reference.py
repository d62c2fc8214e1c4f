"""On a GPU machine without compilers the reference computes every layer densely, and says so once."""

import os
import subprocess
import sys
from pathlib import Path

from tests.gpu.device import NEEDS_GPU

pytestmark = NEEDS_GPU

SCRIPT = """
import logging, torch
logging.basicConfig(format="%(levelname)s %(message)s")
from sparse_backend.ffn import counters, native, reference, sparse_gated_ffn
torch.manual_seed(0)
x, gate_up, down_t = (torch.randn(shape).bfloat16() for shape in ((7, 64), (2 * 192, 64), (192, 64)))
expected = reference.sparse_gated_ffn(x, gate_up / 8, down_t / 14, 0.25, counters.new_counters())
counted = counters.new_counters("cuda")
arguments = (x.cuda(), (gate_up / 8).cuda(), (down_t / 14).cuda(), 0.25, counted, 2**31 - 1)
sparse_gated_ffn(*arguments)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    y = sparse_gated_ffn(*arguments)
counted.zero_()
for _ in range(3):
    graph.replay()
error = torch.linalg.vector_norm(y.cpu().float() - expected.float()) / torch.linalg.vector_norm(expected.float())
print(native.kernel_info("cuda").name, native.max_rows(torch.bfloat16, 64))
print(native.kernel_info("cuda").reason)
print(counted[0].tolist(), counted[1, [0, 3]].tolist())
print(error.item() <= 0.03)
"""


def test_without_compilers_plain_torch_computes(tmp_path: Path) -> None:
    nothing = str(tmp_path / "none")
    none_found = {"PATH": "", "NVCC": nothing, "CXX": nothing, "PROSPARSE_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**os.environ, **none_found}, capture_output=True, text=True, check=True
    )
    kernel, reason, counted, close = done.stdout.splitlines()
    assert kernel == "reference 0"
    assert "there is no nvcc" in reason
    assert counted == "[0, 0, 0, 0] [21, 3]"
    assert close == "True"
    warnings = [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == 1
    assert "there is no nvcc" in warnings[0]
