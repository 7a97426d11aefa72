"""One thread for the networks: what is asked for at about the same time goes through them as one batch."""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from types import TracebackType
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batches(Generic[Item, Result]):
    """Calls `work` with what was submitted, in a thread that ends with the context.

    A batch begins with the first item that waits, takes in what waits already, and waits for items that are announced,
    but no longer than a bound. So one client alone never waits, and while a batch is computed the next one gathers.

    Args:
        work: called with a batch; gives a result for each item, or an exception, which is that of all of them.
        most: items in a batch.
        wait: seconds that the first item of a batch waits at most for others.
    """

    def __init__(self, work: Callable[[list[Item]], Sequence[Result]], most: int, wait: float) -> None:
        self._work, self._most, self._wait = work, most, wait
        self._queue: queue.SimpleQueue[tuple[Item, Future[Result]] | None] = queue.SimpleQueue()
        self._n_announced = 0
        self._lock = threading.Lock()

    def __enter__(self) -> "Batches[Item, Result]":
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queue.put(None)
        self._thread.join()

    @contextmanager
    def announced(self) -> Iterator[Callable[[Item], "Future[Result]"]]:
        """Announces an item that is being made; yields submit(item), to be called once, or not at all."""
        is_open = True

        def close() -> None:
            nonlocal is_open
            with self._lock:
                self._n_announced -= is_open
                is_open = False

        def submit(item: Item) -> "Future[Result]":
            future: Future[Result] = Future()
            close()  # first, or its own batch would wait for it
            self._queue.put((item, future))
            return future

        with self._lock:
            self._n_announced += 1
        try:
            yield submit
        finally:
            close()

    def _run(self) -> None:
        while (first := self._queue.get()) is not None:
            batch, until = [first], time.monotonic() + self._wait
            while len(batch) < self._most:
                left = until - time.monotonic() if self._n_announced else 0
                try:
                    following = self._queue.get(timeout=left) if left > 0 else self._queue.get_nowait()
                except queue.Empty:
                    break
                if following is None:
                    self._queue.put(None)
                    break
                batch.append(following)
            batch = [entry for entry in batch if entry[1].set_running_or_notify_cancel()]
            if not batch:
                continue
            try:
                results = self._work([item for item, _ in batch])
            except Exception as error:  # the one who waits for the result raises it
                for _, future in batch:
                    future.set_exception(error)
            else:
                for (_, future), result in zip(batch, results, strict=True):
                    future.set_result(result)
