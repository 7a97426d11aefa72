import threading
import time

import pytest

from dskd_fast import workers
from dskd_fast.workers import Workers


@pytest.mark.parametrize(("weight", "most"), [(1, 4), (2, 2), (5, 1), (float("inf"), 1), (0, 1)])
def test_work_ahead_comes_in_order_and_within_its_bound(monkeypatch, weight, most):
    monkeypatch.setattr(workers, "MAX_WAITING", 4)
    monkeypatch.setattr(workers, "n_threads", lambda: 3)
    begun, taken, ahead = 0, 0, []
    lock = threading.Lock()

    def work(item):
        nonlocal begun
        with lock:
            begun += 1
            ahead.append(begun - taken)
        time.sleep(0.002 * (item % 3))
        return item, threading.current_thread() is threading.main_thread()

    with Workers() as pool:
        for i, (item, is_main) in enumerate(pool.ahead(range(20), work, lambda _: weight)):
            assert (item, is_main) == (i, weight == 0)
            with lock:
                taken += 1
    assert max(ahead) <= most


def test_an_exception_comes_when_its_result_is_asked_for_and_ends_what_runs_ahead():
    begun = []

    def work(item):
        begun.append(item)
        if item == 2:
            raise ValueError("two")
        return item

    with Workers() as pool:
        results = pool.ahead(range(10**6), work, lambda _: 1)
        assert [next(results), next(results)] == [0, 1]
        with pytest.raises(ValueError, match="two"):
            next(results)
    assert len(begun) < 200


def test_work_behind_waits_for_room_and_for_what_is_too_heavy(monkeypatch):
    monkeypatch.setattr(workers, "MAX_WAITING", 4)
    done = []

    def work(item):
        time.sleep(0.002)
        done.append(item)
        return item

    with Workers() as pool:
        assert pool.behind(work, 0, weight=5).done()
        futures = []
        for i in range(1, 9):
            futures.append(pool.behind(work, i, weight=2))
            assert sum(not future.done() for future in futures) <= 2
    assert [future.result() for future in futures] == [*range(1, 9)]
