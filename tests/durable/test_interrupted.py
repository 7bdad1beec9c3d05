"""A signal handler that raises at any bytecode of the store leaves the store in order."""

from __future__ import annotations

import dis
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import wsgi_bg._store
from tests.durable.support import done, is_sound, task
from wsgi_bg._store.rows import Row
from wsgi_bg._store.store import Store

pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"  # raised in Turn.__del__()
)

PACKAGE = str(Path(wsgi_bg._store.__file__).parent)


def interrupted_calls(
    call: Callable[[], object], error: type[BaseException]
) -> Iterator[BaseException | None]:
    """Call ``call()`` again and again, and raise each time one bytecode later.

    Yields the error that came out, or None. Ends with the first call that has fewer bytecodes.
    """
    places: list[str] = []
    for number in range(100_000):
        left = [number]

        def trace(frame: FrameType, event: str, arg: object, left: list[int] = left) -> Any:
            if not frame.f_code.co_filename.startswith(PACKAGE) or left[0] < 0:
                return None
            frame.f_trace_opcodes = True
            if event == "opcode":
                left[0] -= 1
                if left[0] < 0:
                    place = f"{frame.f_code.co_name}:{frame.f_lineno}"
                    places.append(f"{place} {dis.opname[frame.f_code.co_code[frame.f_lasti]]}")
                    sys.settrace(None)
                    signal.raise_signal(signal.SIGUSR1)
            return trace

        raised = None
        previous = sys.gettrace()  # of coverage
        # Python 3.12 gives bytecodes only if a frame has asked for them before settrace().
        sys._getframe().f_trace_opcodes = True
        sys.settrace(trace)
        try:
            call()
        except error as exc:
            raised = exc.with_traceback(None)
        finally:
            sys.settrace(previous)
        if left[0] >= 0:
            return
        try:
            yield raised
        except GeneratorExit:
            print("after an interrupt in", places[-1])
            raise


def stored_keys(store: Store) -> set[int]:
    return {key for (key,) in store._reader.execute("SELECT key FROM tasks")}


def test_rows_whose_add_was_interrupted_are_not_stored_or_are_read(
    store: Store, error: type[BaseException]
) -> None:
    returned: list[Row] = []

    def add() -> None:
        returned.clear()
        store.add([task(), task()], returned)

    calls = 0
    for raised in interrupted_calls(add, error):
        calls += 1
        if raised is None:
            assert len(returned) == 2
        store.leave(returned)
        left = store.read(0.0, 10)
        assert {row.key for row in left} == stored_keys(store)
        store.take_back(left)
        store.tidy()
    assert calls > 100
    assert len(store._held) < calls
    assert is_sound(store)


def test_a_task_whose_end_was_interrupted_ends_once(
    store: Store, error: type[BaseException]
) -> None:
    rows: list[Row] = []

    def run() -> None:
        rows.clear()
        store.add([task()], rows)
        assert store.begin(rows[0])
        store.end(done(rows[0]))
        store.tidy()

    calls = 0
    for _ in interrupted_calls(run, error):
        calls += 1
        store.take_back(rows)
        store.tidy()
        assert store.is_empty
    assert calls > 100


def test_children_whose_end_was_interrupted_are_stored_with_the_end_of_their_parent(
    store: Store, error: type[BaseException]
) -> None:
    rows: list[Row] = []
    children: list[Row] = []

    def run() -> None:
        children.clear()
        store.end_with(done(rows[0]), [task("child")], children)

    def rows_of_each_call() -> Iterator[Row]:
        while True:
            (row,) = store.add([task("parent")])
            store.begin(row)
            yield row

    each = rows_of_each_call()
    rows[:] = [next(each)]
    for _ in interrupted_calls(run, error):
        store.leave(children)
        left = store.read(0.0, 10)
        names = sorted(row.name for row in left)
        is_ended = rows[0].key not in stored_keys(store)
        assert names == (["child"] if is_ended else [])
        store.take_back([*left, rows[0]])
        store.tidy()
        rows[:] = [next(each)]
    assert is_sound(store)
