"""Work on a sequence of items by a few threads, results in the order of the items, little of it in memory at a time.

Threads, not processes: what takes time here (files, sha256, checksums, tokenizers in Rust) lets go of the interpreter
meanwhile, and texts need not be copied from one process to another.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_MOST_THREADS = 8  # more do not help: one thread hands out the work

Item = TypeVar("Item")
Result = TypeVar("Result")


def num_threads() -> int:
    """How many threads are worth having here."""
    return max(1, min(_MOST_THREADS, os.cpu_count() or 1))


def in_order(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    bytes_of: Callable[[Item], int],
    most_bytes: int,
    threads: int | None = None,
) -> Iterator[Result]:
    """Yield `work(item)` of each item, in the order of the items.

    Args:
        work: called on other threads.
        items: iterated on the caller's thread, ahead of what was yielded.
        bytes_of: size of an item.
        most_bytes: of items at work or waiting to be yielded at a time; a single item may be larger.
        threads: how many; None: `num_threads()`.

    Raises:
        Exception: what `work` or the iterator raised, after the results of all items before it.
    """
    count = num_threads() if threads is None else threads
    source = iter(items)
    under_way: deque[tuple[Future[Result], int]] = deque()
    size = 0
    broken: Exception | None = None
    pool = ThreadPoolExecutor(count, thread_name_prefix="data")
    try:
        while broken is None:
            try:
                item = next(source)
            except StopIteration:
                break
            except Exception as error:  # its turn comes after what was read before it
                broken = error
                break
            own = bytes_of(item)
            while under_way and (size + own > most_bytes or len(under_way) > 2 * count):
                future, freed = under_way.popleft()
                size -= freed
                yield future.result()
            under_way.append((pool.submit(work, item), own))
            size += own
            del item
        while under_way:
            future, _ = under_way.popleft()
            yield future.result()
        if broken is not None:
            raise broken
    finally:
        pool.shutdown(wait=True, cancel_futures=True)  # also when the caller has had enough
