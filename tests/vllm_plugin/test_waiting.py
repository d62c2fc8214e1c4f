import ctypes
import gc
import resource
import threading
import time

import pytest
from vllm.distributed.device_communicators import shm_broadcast
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

from sparse_backend.vllm_plugin import waiting


@pytest.fixture
def reader(monkeypatch):
    """Has just read a message, so that it waits for the next one attentively; with its queue's other end."""
    # Whatever it is by now, it is that again after the test.
    monkeypatch.setattr(shm_broadcast, "sched_yield", shm_broadcast.sched_yield)
    waiting.sleep_while_waiting()
    writer = MessageQueue(1, 1, max_chunk_bytes=1024, max_chunks=2)
    reader = MessageQueue.create_from_handle(writer.export_handle(), 0)
    ready = threading.Thread(target=reader.wait_until_ready)
    ready.start()
    writer.wait_until_ready()
    ready.join(10)
    writer.enqueue("first")
    assert reader.dequeue(timeout=5) == "first"
    return reader, writer


def test_a_reader_that_waits_leaves_its_core_to_others(reader):
    queue, _ = reader
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
    with pytest.raises(TimeoutError):
        queue.dequeue(timeout=0.5)
    # A sleep is a voluntary switch; in vLLM's own loop there is none.
    assert resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw - before > 100


def test_a_message_is_read_while_it_is_fresh(reader):
    queue, writer = reader
    written = []

    def write() -> None:
        time.sleep(0.2)
        written.append(time.monotonic())
        writer.enqueue("second")

    thread = threading.Thread(target=write)
    thread.start()
    assert queue.dequeue(timeout=5) == "second"
    assert time.monotonic() - written[0] < 0.1
    thread.join(10)


class _Memory(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


def in_use() -> int:
    """Bytes that malloc has given out, in all threads."""
    gc.collect()
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Memory
    return mallinfo2().uordblks


def test_a_reader_that_never_rests_keeps_no_memory(reader, monkeypatch):
    """21 to 40 bytes for each message, without it."""
    queue, writer = reader
    monkeypatch.setattr(shm_broadcast.SpinCondition, "record_read", shm_broadcast.SpinCondition.record_read)
    waiting.forget_notifications()

    def pass_messages(seconds: float) -> int:
        passed, end = 0, time.monotonic() + seconds
        while time.monotonic() < end:
            writer.enqueue(passed)
            assert queue.dequeue(timeout=5) == passed
            passed += 1
            time.sleep(0.001)  # ZeroMQ's thread is told of each
        return passed

    def read_up() -> int:
        """What is in use when no more than a few messages are ahead of the reader's last look at its socket."""
        time.sleep(1.1)
        pass_messages(0.01)
        return in_use()

    pass_messages(2)
    before = read_up()
    passed = pass_messages(4)
    assert passed > 1000
    # What was told within the last second would be up to a quarter of the messages.
    assert read_up() - before < 5 * passed, passed
