"""``SlowTasks``: warns of tasks that still run after some time, with their stacks."""

from __future__ import annotations

import gc
import math
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextvars import Context, copy_context
from pathlib import PurePath
from types import AsyncGeneratorType, FrameType
from typing import Any, NamedTuple

from wsgi_bg._loop import portal
from wsgi_bg._process import greenlets
from wsgi_bg._process.greenlets import start_daemon
from wsgi_bg._process.interrupts import type_name
from wsgi_bg._process.per_process import PerProcess
from wsgi_bg._tasks.task_log import log_slow
from wsgi_bg.hooks.base import OptionHooks, TaskRecord

_PACKAGE = PurePath(__file__).parents[1]
_FRAMES = (("cr_frame", "cr_await"), ("gi_frame", "gi_yieldfrom"), ("ag_frame", "ag_await"))
_NO_STACK = "(the stack is not known under gevent)"


class SlowTasks(OptionHooks):
    """Logs a WARNING for each attempt of a task that takes longer than ``seconds``.

    A daemon thread of the process, which all these hooks share, waits for the next task whose
    time is up. Under gevent the thread may be a greenlet, which a task that computes holds up.
    The record has the context variables that the task had when its call began, and the name of
    the task's thread.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def task_added(self, record: TaskRecord) -> None:
        """Start the thread: on the thread of a request, and not on the event loop's."""
        _watches.get().start()

    def task_started(self, record: TaskRecord) -> None:
        """Begin to watch a call."""
        _watches.get().begin(record, self._seconds)

    def task_finished(self, record: TaskRecord) -> None:
        """Watch the call no longer."""
        _watches.get().end(record, self._seconds)

    def task_failed(self, record: TaskRecord) -> None:
        """See :meth:`task_finished`."""
        self.task_finished(record)

    def task_retried(self, record: TaskRecord) -> None:
        """See :meth:`task_finished`."""
        self.task_finished(record)

    def task_discarded(self, record: TaskRecord) -> None:
        """See :meth:`task_finished`."""
        self.task_finished(record)


class _Call(NamedTuple):
    """A call that runs: when its time is up, and if greenlets share its thread.

    The context is a copy, made when the call began: no second thread can enter the context of
    a task that runs.
    """

    deadline: float
    is_on_greenlet: bool
    context: Context


class _Watch:
    """The calls of a process that run, and the thread that looks at them."""

    def __init__(self) -> None:
        # By the seconds that a call may take: so the calls of each number are in the order of
        # their deadlines.
        self._calls: dict[float, dict[TaskRecord, _Call]] = {}
        self._right = {"to start": True}
        self._next_look = math.inf  # by time.monotonic(); infinite while the thread looks, too
        self._wake = greenlets.event_for_thread()

    def start(self) -> None:
        """Start the thread, unless it runs."""
        if self._right.pop("to start", False):  # one atomic step
            try:
                start_daemon(self._work, "wsgi_bg-slow")
            except RuntimeError:  # no memory for a thread: the next task tries again
                self._right["to start"] = True

    def begin(self, record: TaskRecord, seconds: float) -> None:
        self.start()
        deadline = time.monotonic() + seconds
        call = _Call(deadline, greenlets.is_on_greenlet(), copy_context())
        self._calls_of(seconds)[record] = call
        if deadline < self._next_look:  # else the thread looks again before
            self._wake.set()

    def end(self, record: TaskRecord, seconds: float) -> None:
        self._calls_of(seconds).pop(record, None)

    def _calls_of(self, seconds: float) -> dict[TaskRecord, _Call]:
        return self._calls.setdefault(seconds, {})

    def _work(self) -> None:
        while True:
            self._next_look = math.inf
            self._next_look = self._look()
            left = self._next_look - time.monotonic()
            self._wake.wait(min(max(0.0, left), threading.TIMEOUT_MAX))
            self._wake.clear()

    def _look(self) -> float:
        """Warn of calls whose time is up; return the next deadline."""
        now = time.monotonic()
        next_deadline = math.inf
        # dict.copy() is a single atomic step.
        for seconds, calls in self._calls.copy().items():
            for record, call in calls.copy().items():
                if call.deadline > now:
                    next_deadline = min(next_deadline, call.deadline)
                    break  # the calls are in the order of their deadlines
                stack = _NO_STACK if call.is_on_greenlet else _shown_stack_of(record)
                if calls.pop(record, None) is call:  # it has not ended meanwhile
                    thread = _thread_of(record)
                    call.context.run(log_slow, record.task, seconds, stack, thread)
        return next_deadline


_watches: PerProcess[_Watch] = PerProcess(_Watch)


def _thread_of(record: TaskRecord) -> str | None:
    """The name of the thread that makes the call, or awaits the result of the call."""
    if record.awaitable is None or record.task.is_async:
        return record.thread
    return portal.THREAD_NAME  # a thread of the pool has made the coroutine


def _shown_stack_of(record: TaskRecord) -> str:
    try:
        return _stack_of(record)
    except Exception as exc:  # by an awaitable of the user: the thread has other calls to watch
        return f"(the stack cannot be read: {type_name(exc)})"


def _stack_of(record: TaskRecord) -> str:
    """The stack of a call, the innermost frame last, without the frames of this package."""
    threads = sys._current_frames()  # noqa: SLF001
    # Without this frame, which would be in a cycle with the frames of all threads.
    threads.pop(threading.get_ident(), None)
    frames: list[FrameType] = []
    if record.awaitable is None:
        frames = _walk(threads.get(record.thread_id or 0))
    else:
        frames = list(_frames_of(record.awaitable))
        if frames and _is_running(record.awaitable):
            stacks = map(_walk, threads.values())
            frames = next((each for each in stacks if frames[0] in each), frames)
    inside = [_is_ours(frame) for frame in frames]
    first = len(inside) - inside[::-1].index(True) if True in inside else 0
    lines = traceback.StackSummary.extract((each, each.f_lineno) for each in frames[first:])
    return "".join(lines.format()).rstrip()


def _walk(innermost: FrameType | None) -> list[FrameType]:
    return [frame for frame, _ in traceback.walk_stack(innermost)][::-1]


def _is_ours(frame: FrameType) -> bool:
    return PurePath(frame.f_code.co_filename).is_relative_to(_PACKAGE)


def _is_running(awaitable: Any) -> bool:
    return bool(getattr(awaitable, "cr_running", False))


def _frames_of(awaitable: Any) -> Iterator[FrameType]:
    """The frames of a coroutine, and of the coroutines and generators that it waits for."""
    while awaitable is not None:
        for kind, inner in _FRAMES:
            frame = getattr(awaitable, kind, None)
            if isinstance(frame, FrameType):  # a proxy or a mock has any attribute, without end
                yield frame
                awaitable = getattr(awaitable, inner)
                break
        else:
            awaitable = _generator_of(awaitable)


def _generator_of(awaitable: Any) -> Any:
    """The async generator of which ``awaitable`` is a step, which has no attribute for it."""
    if not type(awaitable).__name__.startswith("async_generator_"):
        return None
    found = gc.get_referents(awaitable)
    return next((each for each in found if type(each) is AsyncGeneratorType), None)
