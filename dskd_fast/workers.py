"""Threads beside the one that computes: they make ready what it needs next and finish what it has made, in order.

They are for reading, drawing and writing, in which Pillow, NumPy and the system release the interpreter's lock. What
waits on either side is bounded in bytes; a piece that is heavier than that is done by itself, while the caller waits.
"""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Bytes, and pieces, that may wait on each side: a photograph of 24 megapixels and the next.
MAX_WAITING = 160 * 2**20
_MAX_PIECES = 64
# More would wait for memory, and each holds a picture.
_MAX_THREADS = 16


def n_threads() -> int:
    """As many as there are cores for this process, at most 16."""
    # Where the system cannot say (macOS, Windows), all cores are.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MAX_THREADS)


class Workers:
    """A pool of threads, which ends with the context: what is behind is done first, after an error only what has begun.

    Example:
        >>> with Workers() as workers:
        ...     squares = workers.ahead(range(4), lambda x: x * x, weigh=lambda x: 1)
        ...     written = [workers.behind(print, square, weight=1) for square in squares if square == 9]
        9
    """

    def __enter__(self) -> "Workers":
        self._pool = ThreadPoolExecutor(n_threads())
        self._unfinished: deque[tuple[Future, int]] = deque()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            wait([future for future, _ in self._unfinished])
        self._pool.shutdown(cancel_futures=True)

    def ahead(
        self, items: Iterable[Item], work: Callable[[Item], Result], weigh: Callable[[Item], float]
    ) -> Generator[Result, None, None]:
        """`map(work, items)` in threads that run ahead of the caller.

        Args:
            items: taken one after the other by the caller's thread.
            work: its exception is raised when its result is asked for.
            weigh: the bytes that an item will take; 0 for one that is done in the caller's thread, when asked for.
        """
        waiting: deque[tuple[Future[Result], float]] = deque()
        upcoming = ((item, weigh(item)) for item in items)
        following = next(upcoming, None)
        try:
            while waiting or following is not None:
                if waiting:
                    future, weight = waiting.popleft()
                else:
                    assert following is not None
                    future, weight = self._begin(work, *following), following[1]
                    following = next(upcoming, None)
                held = weight + sum(other for _, other in waiting)
                while following is not None and 0 < following[1] <= MAX_WAITING - held and len(waiting) < _MAX_PIECES:
                    waiting.append((self._begin(work, *following), following[1]))
                    held += following[1]
                    following = next(upcoming, None)
                result = [future.result()]
                del future
                yield result.pop()  # from now on it is the caller's alone
        finally:
            for future, _ in waiting:
                future.cancel()

    def _begin(self, work: Callable[[Item], Result], item: Item, weight: float) -> "Future[Result]":
        if weight:
            return self._pool.submit(work, item)
        done: Future[Result] = Future()
        done.set_result(work(item))
        return done

    def behind(self, work: Callable[..., Result], *arguments: Any, weight: int) -> "Future[Result]":
        """Have a thread call `work`; waits first until what is unfinished and this take no more than the bound.

        Raises:
            Exception: what an earlier piece that it waited for has raised.
        """
        while self._unfinished and (
            weight + sum(other for _, other in self._unfinished) > MAX_WAITING or len(self._unfinished) >= _MAX_PIECES
        ):
            self._unfinished.popleft()[0].result()
        future = self._pool.submit(work, *arguments)
        if weight > MAX_WAITING:
            wait([future])
        else:
            self._unfinished.append((future, weight))
        return future
