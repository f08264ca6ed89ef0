"""Ranks as threads of one process: they meet at a barrier, in place of gloo."""

import threading
from contextlib import contextmanager
from unittest import mock

import torch.distributed as dist


class Meeting:
    """What ``torch.distributed`` exchanges, among ``size`` threads; it counts what they say."""

    def __init__(self, size):
        self.size, self.barrier = size, threading.Barrier(size, timeout=20)
        self.said, self.own, self.rounds = [None] * size, threading.local(), 0

    def rank(self):
        return self.own.rank

    def exchange(self, value):
        self.said[self.rank()] = value
        if self.barrier.wait() == 0:
            self.rounds += 1
        found = list(self.said)
        self.barrier.wait()
        return found

    def all_gather_object(self, found, value):
        found[:] = self.exchange(value)

    def broadcast(self, tensor, src):
        tensor.copy_(self.exchange(tensor.clone())[src])


@contextmanager
def meeting_of(size):
    """``torch.distributed`` is among the threads of ``on_all``, for the block."""
    meeting = Meeting(size)
    names = {
        "is_initialized": lambda: hasattr(meeting.own, "rank"),
        "get_rank": meeting.rank,
        "get_world_size": lambda: size,
        "all_gather_object": meeting.all_gather_object,
        "broadcast": meeting.broadcast,
    }
    with mock.patch.multiple(dist, **names):
        yield meeting


def on_all(size, work):
    """What ``work(rank)`` returns on each of ``size`` ranks, or the exception that it raises."""
    results = [None] * size

    def run(rank):
        meeting.own.rank = rank
        try:
            results[rank] = work(rank)
        except threading.BrokenBarrierError as error:
            results[rank] = error
        except Exception as error:
            results[rank] = error
            if isinstance(error, AssertionError):
                meeting.barrier.abort()

    with meeting_of(size) as meeting:
        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return results
