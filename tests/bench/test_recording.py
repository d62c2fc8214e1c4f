"""The recount of recorded inputs, against the counters of the op that was given them."""

from types import SimpleNamespace

import pytest
import torch

from sparse_backend.bench.recording import RecordingWorkerExtension
from sparse_backend.ffn import counters, op
from tests.ffn.layers import ALL_DENSE, ALL_SPARSE, Case


@pytest.mark.parametrize("path", [ALL_SPARSE, ALL_DENSE], ids=["sparse", "dense"])
@pytest.mark.parametrize("drelu", [False, True], ids=["one side", "drelu"])
def test_a_plain_count_of_the_values_is_what_the_op_counted(drelu: bool, path: int) -> None:
    case = Case.random(7, 64, 128, torch.float32, density=0.2, threshold=0.1, drelu=drelu)
    counted = counters.new_counters(drelu=drelu)
    inputs = [case.x[:3].clone(), case.x[3:].clone()]
    for x in inputs:
        op.sparse_gated_ffn(x, case.gate_up, case.down_t, 0.1, counted, path, None, drelu)
    mlp = SimpleNamespace(
        gate_up_proj=SimpleNamespace(weight=case.gate_up),
        counters=counted,
        **{"layer_index": 0, "d_ff": 128, "threshold": 0.1, "drelu": drelu, "max_sparse_rows": path},
    )
    recorder = RecordingWorkerExtension()
    recorder._inputs = {0: inputs}
    recount = recorder._recount(mlp)
    assert recount["same_gates"] == recount["counters"]
    assert recount["counters"]["rows"] == 7
    assert recount["gates"] == 7 * 128 * (2 if drelu else 1)
    assert recount["moved_beyond_rounding"] == 0
