"""Counters copied to pinned memory while the GPU is busy."""

import time

import torch

from sparse_backend.vllm_plugin.counter_copy import CounterCopy
from tests.gpu.device import NEEDS_GPU

pytestmark = NEEDS_GPU

BUSY_CYCLES = 1_000_000_000  # about half a second


def test_a_copy_waits_for_nothing_and_is_of_its_moment():
    counters = [torch.full((2, 4), layer, dtype=torch.int64, device="cuda") for layer in range(40)]
    CounterCopy(counters).wait()  # the first one pins its memory, which waits for the GPU
    for counter in counters:
        counter += 0  # loads the kernel, which may do so as well

    torch.cuda._sleep(BUSY_CYCLES)
    for counter in counters:
        counter += 100
    begin = time.perf_counter()
    copy = CounterCopy(counters)
    for counter in counters:
        counter += 1000
    assert not copy.done()
    assert time.perf_counter() - begin < 0.1
    assert copy.wait() == [[[100 + layer] * 4] * 2 for layer in range(40)]
    assert copy.done()


def test_copies_under_way_do_not_disturb_each_other():
    counters = [torch.zeros((2, 4), dtype=torch.int64, device="cuda") for _ in range(3)]
    copies = []
    torch.cuda._sleep(BUSY_CYCLES // 10)
    for _ in range(20):
        copies.append(CounterCopy(counters))
        for counter in counters:
            counter += 1
    assert [copy.wait() for copy in copies] == [[[[step] * 4] * 2] * 3 for step in range(20)]
