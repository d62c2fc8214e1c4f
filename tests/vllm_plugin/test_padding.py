"""The op that leaves vLLM's padding out, with a forward context such as a GPU model runner sets."""

import logging

import pytest
import torch
from vllm.forward_context import ForwardContext, override_forward_context

from sparse_backend.ffn import counters, gated_activation, sparse_gated_ffn
from sparse_backend.ffn.counters import ACTIVE, DENSE, ROWS, SPARSE, STEPS
from sparse_backend.vllm_plugin import padding
from sparse_backend.vllm_plugin.padding import gated_activation_of_real_rows, sparse_gated_ffn_of_real_rows

ROWS_OF_STEP, D_MODEL, D_FF = 6, 16, 64


@pytest.fixture
def layer():
    generator = torch.Generator().manual_seed(0)
    x, gate_up, down_t = (
        torch.randn(shape, generator=generator)
        for shape in ((ROWS_OF_STEP, D_MODEL), (2 * D_FF, D_MODEL), (D_FF, D_MODEL))
    )
    return x, gate_up, down_t, 0.5


def context(is_padding):
    return override_forward_context(
        ForwardContext(no_compile_layers={}, attn_metadata={}, slot_mapping={}, is_padding=is_padding)
    )


def mask(real_rows):
    return torch.arange(ROWS_OF_STEP) >= real_rows


@pytest.mark.parametrize("max_sparse_rows", [0, 2**31 - 1])
@pytest.mark.parametrize("real_rows", [0, 1, 4, ROWS_OF_STEP])
def test_padding_is_neither_computed_nor_counted(layer, max_sparse_rows, real_rows):
    x, *weights = layer
    x[real_rows:] = torch.nan
    counted, expected_counted = counters.new_counters(), counters.new_counters()
    with context(mask(real_rows)):
        y = sparse_gated_ffn_of_real_rows(x, *weights, counted, max_sparse_rows)
    expected = sparse_gated_ffn(x[:real_rows].clone(), *weights, expected_counted, max_sparse_rows)
    torch.testing.assert_close(y[:real_rows], expected)
    assert not y[real_rows:].any()
    assert counted.equal(expected_counted)


@pytest.mark.parametrize("no_mask", [override_forward_context(None), context(None)], ids=["no context", "no mask"])
def test_without_marks_every_row_is_a_token(layer, no_mask):
    counted = counters.new_counters()
    with no_mask:
        y = sparse_gated_ffn_of_real_rows(*layer, counted, 0)
    assert counted[:, ROWS].sum() == ROWS_OF_STEP
    assert y.equal(sparse_gated_ffn(*layer, counters.new_counters(), 0))


def test_marks_that_vllm_does_not_refresh_are_not_believed(layer, monkeypatch, caplog):
    """They are those of the warm-up, all True: every row would be skipped."""
    monkeypatch.setenv("VLLM_MOE_SKIP_PADDING", "0")
    counted = counters.new_counters()
    with context(mask(0)), caplog.at_level(logging.WARNING):
        sparse_gated_ffn_of_real_rows(*layer, counted, 0)
        padding.check_mask()
    assert counted[:, ROWS].sum() == ROWS_OF_STEP
    assert "VLLM_MOE_SKIP_PADDING" in caplog.text


def test_nothing_is_said_where_the_marks_are_right(caplog):
    with caplog.at_level(logging.WARNING):
        padding.check_mask()
    assert not caplog.records


def test_compiled_code_reads_the_marks_of_each_step(layer):
    x, *weights = layer
    counted = counters.new_counters()
    compiled = torch.compile(
        lambda x: sparse_gated_ffn_of_real_rows(x * 2, *weights, counted, 4), fullgraph=True, dynamic=True
    )
    for real_rows in (2, 5):
        with context(mask(real_rows)):
            y = compiled(x)
        assert [bool(row.any()) for row in y] == (~mask(real_rows)).tolist()
    assert counted[:, ROWS].sum() == 2 + 5
    assert counted[:, STEPS].sum() == 2


def test_compiled_layers_share_the_counts_of_rows(layer):
    x, *weights = layer
    layers = [counters.new_counters() for _ in range(3)]
    row_active, expected = (torch.zeros(ROWS_OF_STEP, dtype=torch.int32) for _ in range(2))

    @torch.compile(fullgraph=True)
    def compiled(x):
        for counted in layers:
            x = x + sparse_gated_ffn_of_real_rows(x, *weights, counted, 4, row_active=row_active)
        return x

    for real_rows in (2, 5):
        with context(mask(real_rows)):
            compiled(x)
            y = x
            for _ in layers:
                y = y + sparse_gated_ffn_of_real_rows(y, *weights, counters.new_counters(), 4, row_active=expected)
    assert expected[:2].all()
    assert not expected[5:].any()
    assert row_active.tolist() == expected.tolist()
    assert sum(counted[:, ACTIVE].sum() for counted in layers) == expected.sum()


def test_both_paths_are_reached(layer):
    counted = counters.new_counters()
    with context(mask(3)):
        sparse_gated_ffn_of_real_rows(*layer, counted, ROWS_OF_STEP - 1)
        sparse_gated_ffn_of_real_rows(*layer, counted, ROWS_OF_STEP)
    # The limit is compared with all rows: under a CUDA graph their number is what the host knows.
    assert counted[DENSE, ROWS] == counted[SPARSE, ROWS] == 3


def test_opcheck(layer):
    with context(mask(4)):
        torch.library.opcheck(
            torch.ops.prosparse.sparse_gated_ffn_of_real_rows.default,
            (*layer, counters.new_counters(), 4, False, torch.zeros(8, dtype=torch.int32)),
        )


@pytest.mark.parametrize("drelu", [False, True])
def test_the_activation_leaves_padding_out_too(layer, drelu):
    x, gate_up = layer[:2]
    gate_up_out = x @ gate_up.t()
    counted, expected_counted = (counters.new_counters(drelu=drelu) for _ in range(2))
    row_active = torch.zeros(ROWS_OF_STEP, dtype=torch.int32)
    with context(mask(4)):
        h = gated_activation_of_real_rows(gate_up_out, 0.5, counted, drelu, row_active)
        torch.library.opcheck(
            torch.ops.prosparse.gated_activation_of_real_rows.default,
            (gate_up_out, 0.5, counters.new_counters(drelu=drelu), drelu, torch.zeros(8, dtype=torch.int32)),
        )
    expected = gated_activation(gate_up_out[:4].clone(), 0.5, expected_counted, None, drelu)
    assert torch.equal(h[:4], expected)
    assert not h[4:].any()
    assert counted.equal(expected_counted)
    assert row_active.sum() == counted[:2, ACTIVE].sum()
