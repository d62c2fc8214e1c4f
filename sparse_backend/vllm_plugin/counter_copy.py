"""Counters on their way from the device to the host."""

import torch


class CounterCopy:
    """The counters of some layers as of the moment of construction.

    On a GPU the copy queues up behind the steps already launched and before all later ones: the counters of every layer are of
    the same step, and nobody waits. Construct it on the thread, and so on the stream, that runs the model.
    """

    def __init__(self, counters: list[torch.Tensor]) -> None:
        """``counters``: int64 [2, 4] per layer, all on one device."""
        stacked = torch.stack(counters) if counters else torch.empty(0)
        self._done: torch.cuda.Event | None = None
        self._host = stacked
        if stacked.is_cuda:
            # Only into pinned memory does a copy run beside the host.
            self._host = torch.empty(stacked.shape, dtype=stacked.dtype, device="cpu", pin_memory=True)
            self._host.copy_(stacked, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()

    def done(self) -> bool:
        """Has the copy arrived? Does not wait."""
        return self._done is None or self._done.query()

    def wait(self) -> list[list[list[int]]]:
        """The counts, [layer][path][kind], as soon as they have arrived."""
        if self._done is not None:
            self._done.synchronize()
        return self._host.tolist()
