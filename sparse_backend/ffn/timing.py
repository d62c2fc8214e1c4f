"""Times of CUDA work: medians of CUDA-graph replays, with variants taking turns."""

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

_WARM_UP = 3


@dataclass(frozen=True)
class Recording:
    """A CUDA graph of calls that ran one after the other, and the tensors its replays write."""

    graph: torch.cuda.CUDAGraph
    outputs: list[torch.Tensor]


def record(calls: Sequence[Callable[[], torch.Tensor]], stream: torch.cuda.Stream | None = None) -> Recording:
    """Run the calls once, then capture them as one graph.

    Args:
        calls: what to capture; each allocates what it returns.
        stream: where to capture, for calls that insist on one.
    """
    stream = stream or _stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        # What happens once (loading kernels, cuBLAS' workspace, torch.compile) must not happen under capture.
        for call in calls:
            call()
        torch.cuda.synchronize()
        # torch.cuda.graph() would collect garbage and empty the allocator's cache each time, longer than a measurement takes.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            outputs = [call() for call in calls]
        finally:
            graph.capture_end()
    torch.cuda.synchronize()
    return Recording(graph, outputs)


def medians_us(
    graphs: Mapping[str, torch.cuda.CUDAGraph], *, seconds: float, replays: tuple[int, int]
) -> dict[str, float]:
    """Microseconds of one replay of each graph, median; the graphs take turns, and who begins changes each time.

    Args:
        graphs: by name.
        seconds: about how long to measure, as far as the next argument allows.
        replays: of each graph, at least and at most.
    """
    names = list(graphs)

    def rounds(count: int) -> list[dict[str, tuple[torch.cuda.Event, torch.cuda.Event]]]:
        recorded = []
        for index in range(count):
            events = {}
            for name in names[:: 1 if index % 2 == 0 else -1]:
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                graphs[name].replay()
                end.record()
                events[name] = (start, end)
            recorded.append(events)
        torch.cuda.synchronize()
        return recorded

    begin = time.perf_counter()
    rounds(_WARM_UP)
    one_round = (time.perf_counter() - begin) / _WARM_UP
    least, most = replays
    measured = rounds(max(least, min(most, round(seconds / one_round))))
    return {
        name: statistics.median(events[name][0].elapsed_time(events[name][1]) for events in measured) * 1e3
        for name in names
    }


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    # One for all captures: cuBLAS keeps a workspace per stream.
    return torch.cuda.Stream(device)
