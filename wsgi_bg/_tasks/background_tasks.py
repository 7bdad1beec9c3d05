"""``BackgroundTasks``: the calls of a request, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import Context, copy_context
from itertools import takewhile
from time import monotonic
from typing import Any, ParamSpec, Protocol

from wsgi_bg._process import log, per_process
from wsgi_bg._process.interrupts import is_from_signal_handler, safe_repr, stops_worker
from wsgi_bg._process.printable import printable
from wsgi_bg._tasks import successors, task_log
from wsgi_bg._tasks.checks import WhenUnsent
from wsgi_bg._tasks.options import DEFAULTS, OnError, Options
from wsgi_bg._tasks.retry import Retry
from wsgi_bg._tasks.task import (
    BackgroundTask,
    Layer,
    RunOn,
    WasDiscarded,
    current,
    fill,
    plan_of,
)
from wsgi_bg.exceptions import BatchEndedError, TaskTypeError

P = ParamSpec("P")

OPEN, CLOSED, ENDED = range(3)
"""The phases of a request's tasks. OPEN: the request goes on. CLOSED: the request is over; the
tasks wait or run, and may add further tasks. ENDED: no task will run any more.

No lock guards the phase. A thread that adds a task appends the task, then reads the phase. A
thread that ends the batch sets the phase, then reads the list. So at least one of the two
threads sees the other's change, and :meth:`BackgroundTask.claim` decides. All that follow this
rule are here: :meth:`BackgroundTasks.add_task`, and the methods of :class:`TaskQueue`."""

_LONG = 50  # tasks

_LONGEST_LABEL = 500  # characters

_new_task = BackgroundTask.__new__


class BackgroundTasks:
    """The calls of a request, in order.

    In a request the middleware makes the object, and the tasks run after the response.
    An object made by hand is a list of calls, which :meth:`__call__` runs.

    :param tasks: tasks to begin with.
    :raises TypeError: if ``tasks`` is not a list, or an item is not a :class:`BackgroundTask`.
    """

    # Users need tasks, add_task, using and the call. The other names are for the package's own
    # modules.

    __slots__ = (
        "_list",
        "_request",
        "handed_over_at",
        "is_endless",
        "options",
        "phase",
        "successors",
    )

    _list: list[BackgroundTask] | None
    is_endless: bool  # only if an endless row of tasks was cut: see wsgi_bg._tasks.successors
    successors: tuple[int, int, int]  # only if a task was added since another task has ended
    options: Options
    phase: int
    _request: str | tuple[Any, ...] | None  # only once the label is known
    handed_over_at: float  # by time.monotonic(), and only if there are hooks

    origin: BackgroundTasks | None = None
    """The tasks of the request, if these are tasks of it that have waited for their time."""

    def __init__(self, tasks: Sequence[BackgroundTask] | None = None) -> None:
        given: Any = () if tasks is None else tasks
        if not isinstance(given, Iterable):
            raise _wrong_tasks(tasks)
        listed = [*given]
        for task in listed:
            if not isinstance(task, BackgroundTask):
                raise _wrong_tasks(task)
        self._list = [task.owned(DEFAULTS) for task in listed]
        self.options = DEFAULTS
        self.phase = OPEN

    @property
    def tasks(self) -> list[BackgroundTask]:
        """The tasks that are not done, in the order of ``add_task``.

        While the request goes on, this is the internal list and must only be read: a task
        that joins the list without :meth:`add_task` has no options and no context of this
        request, and runs in a single batch only. After the request this is a new list.
        """
        if self._list is None and self.phase == ENDED:
            return []
        return self.open_list()

    @property
    def request(self) -> str | None:
        """The label of the request; None before its end, and without a request."""
        found = getattr(self, "_request", None)
        if type(found) is tuple:  # formatted only if someone asks
            self._request = found = _request_label(*found)
        return found

    @request.setter
    def request(self, label: str | None) -> None:
        self._request = label

    def restore_request(self, label: object) -> None:
        """Note the label in the message or the row of a task, which may be forged."""
        if isinstance(label, str):
            self._request = _shortened(label)

    def note_early(self, environ: Mapping[str, Any]) -> None:
        """Note the label of a ``request_label`` before the end of the request."""
        if self.options.request_label is not None:
            self.note_request(environ)

    def note_request(self, environ: Mapping[str, Any]) -> None:
        """Note the label of the request that ``environ`` belongs to, for logs and hooks."""
        make = self.options.request_label
        if make is not None and self.request is not None:
            return
        if make is None or not environ:  # empty for a response that was not closed, nor freed
            method = environ.get("REQUEST_METHOD")
            if method is not None:
                self._request = method, environ.get("SCRIPT_NAME"), environ.get("PATH_INFO")
            return
        try:
            label = make(environ)
            if not isinstance(label, str):
                raise TypeError(f"a str is wanted, and not {safe_repr(label)}")
            self._request = _shortened(label)
        except BaseException as exc:
            if is_from_signal_handler(exc):
                raise
            log.error("request_label raised", exc_info=exc)

    def as_seen_in(self, options: Layer) -> BackgroundTasks:
        """Return this object as the layer of middleware sees it whose task has ``options``."""
        layer = options.of_layer(self.options)
        return self if layer is self.options else View(self, layer)

    def open_list(self) -> list[BackgroundTask]:
        """Return the list that :meth:`add_task` appends to."""
        return self._begin() if self._list is None else self._list

    def add_task(
        self, func: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs
    ) -> BackgroundTask:
        """Add a call of ``func``, to run after all tasks added before.

        May be called on any thread of the request and in a running task; does not wait for
        any task. The task runs in a copy of the current context variables.

        :param func: a plain or ``async def`` function, called as ``func(*args, **kwargs)``.
        :return: the task, whose :attr:`~BackgroundTask.id` names the task in other processes.
        :raises TypeError: if ``func`` cannot run as a task.
        :raises RuntimeError: if the batch has ended, or the task has a delay and too many
            tasks wait for their time.
        """
        options = self.options
        task = _new_task(BackgroundTask)
        fill(task, func, args, kwargs, copy_context(), options)
        tasks = self._list
        if tasks is None:
            if self.phase == ENDED and self._successor() is None:
                raise BatchEndedError(task.name)
            tasks = self._begin()
        if options.is_watched or successors.watched:
            root = self.root
            options.admit(task, root)
            tasks.append(task)
            options.calls.joined(task, root)
        else:
            tasks.append(task)
        if self.phase == ENDED and task.claim():
            self.root.remove(task)
            successor = self._successor()
            if successor is not None and successor.adopt(task):
                return task
            options.calls.forget(task)
            task_log.notify_discarded(task, "the batch has ended")
            raise BatchEndedError(task.name)
        return task

    @property
    def root(self) -> BackgroundTasks:
        """The object that all views share; this object, unless it is a view."""
        return self

    def _successor(self) -> BackgroundTasks | None:
        """The tasks that the running task belongs to, if the task came from this object.

        A task that has waited for its time may keep the object that its view had.
        """
        running = current.get(None)
        root = None if running is None else running.root
        return root if root is not None and root.origin is self.root else None

    def adopt(self, task: BackgroundTask) -> bool:
        """Add a claimed task; called by a running task. False if this batch has ended."""
        copy = task.successor()
        task.options.calls.moved(task, copy, self)
        self.open_list().append(copy)
        return not (self.phase == ENDED and copy.claim())

    def _begin(self) -> list[BackgroundTask]:
        """Make the list, if ``__init__`` has not made it."""
        raise NotImplementedError

    @property
    def is_closed(self) -> bool:
        """True if the request is over and its tasks wait or run."""
        return self.phase == CLOSED

    @property
    def has_ended(self) -> bool:
        """True if no task will run any more."""
        return self.phase == ENDED

    def remove(self, task: BackgroundTask) -> None:
        """Drop a task that was run by hand or refused; may be called on any thread."""
        assert self._list is not None
        try:  # noqa: SIM105  # suppress() costs 0.2 us
            self._list.remove(task)
        except ValueError:  # the batch has taken the task, and skips it
            pass

    def notify_failure(self, task: BackgroundTask, exc: BaseException) -> None:
        """Call the hooks and the ``on_error`` of a failed task, in the task's context."""
        task_log.notify_failure(task, exc)

    def expects(self, task: BackgroundTask) -> bool:
        """True if ``task`` runs, as far as the outcome of the request is known."""
        return True

    def admit_wait(self, task: BackgroundTask) -> None:
        """Admit ``task``, which has a delay or may be called again, and is about to be added.

        :raises RuntimeError: if the task has a delay, and too many tasks wait already.
        """

    def using(
        self,
        *,
        run_on: RunOn | None = None,
        failed_from: int | None = None,
        on_error: OnError | None = None,
        stop_on_error: bool | None = None,
        celery: Mapping[str, Any] | None = None,
        engine: Mapping[str, Any] | None = None,
        retry: Retry | None = None,
        delay: float | None = None,
        when_unsent: WhenUnsent | None = None,
    ) -> BackgroundTasks:
        """Return a view on the same list, whose ``add_task`` gives its tasks these options.

        An option that is None keeps its value. The options are those of
        :class:`~wsgi_bg.BackgroundTasksMiddleware`, and the options of a message to Celery.

        :param celery: options such as ``{"queue": "slow", "countdown": 60}``, which override
            the options of ``registered_task``. Runners without Celery ignore them, and so
            does a task that runs in this process because the broker cannot be reached.
        :param engine: options for the engine of the runner, such as RQ or Dramatiq, which
            override the options of ``registered_task``. ``add_task`` lets the runner check
            them; runners without an engine ignore them.
        :param retry: when the task is called again after an error, in place of the ``retry``
            of ``registered_task``.
        :param delay: how long the task waits, in seconds, counted from the end of the
            request, or from ``add_task`` in a running task. The wait holds no thread, and
            the tasks added later do not wait for this task.
        :param when_unsent: for a task that cannot be sent to another process, in place of the
            option of ``registered_task`` and the runner. Runners that send nothing ignore it.
        :raises ValueError: if ``run_on`` is none of ``"success"``, ``"error"``, ``"always"``,
            ``failed_from`` is not from 100 to 600, ``delay`` is negative, infinite or NaN,
            ``celery`` has an unknown option, or ``countdown`` or ``eta`` beside a delay.
        :raises TypeError: if ``failed_from`` is not a whole number, ``on_error`` is not a
            plain callable, ``retry`` is not a ``Retry``, ``delay`` is not a number (such as
            a timedelta), ``engine`` is not a dict, or an option in ``celery`` is of the wrong
            type.
        """
        options = self.options.override(
            run_on=run_on,
            failed_from=failed_from,
            on_error=on_error,
            stop_on_error=stop_on_error,
            celery=celery,
            engine=engine,
            retry=retry,
            delay=delay,
            when_unsent=when_unsent,
        )
        return View(self, options)

    def __call__(self) -> None:
        """Run the tasks that have not run yet, each once; blocks until they are done.

        Plain functions run on the calling thread. The batch stays open: tasks added later
        run when the response is closed.

        :raises BaseException: the first error of a task, after all tasks have run; later
            errors are logged.
        """
        first: BaseException | None = None
        generation = per_process.generation
        while (task := self._claim_next()) is not None:
            context = task.take_context(self if isinstance(self, TaskQueue) else None)
            began = monotonic() if log.is_debug() else None
            try:
                task.call_in(context)
            except WasDiscarded:
                pass
            except BaseException as exc:
                if stops_worker(exc) or per_process.generation != generation:
                    raise
                if first is None:
                    first = exc
                    if began is not None:
                        context.run(task_log.log_end, task, began, exc)
                else:
                    context.run(task_log.log_failure, task, exc, None, began)
                    context.run(self.notify_failure, task, exc)
            else:
                if began is not None:
                    context.run(task_log.log_end, task, began)
            if per_process.generation != generation:
                return  # in the child process that the task has forked
            self.remove(task)
        if first is not None:
            try:
                raise first
            finally:
                del first  # or it refers to itself, by this frame

    def _claim_next(self) -> BackgroundTask | None:
        return next((task for task in self.tasks if task.claim()), None)

    def __repr__(self) -> str:
        names = ", ".join(task.name for task in self.tasks)
        return f"<{type(self).__name__} [{names}]{' ended' if self.phase == ENDED else ''}>"


class TaskQueue(BackgroundTasks):
    """The tasks of a request, from which a batch takes the first task until none is left.

    The batch drops each finished task, so that a chain of tasks, each adding its successor for
    days, keeps a single task in memory. A long list is emptied in a single step: deleting its
    first item moves all the rest.

    :param tasks: tasks to begin with.

    :ivar front: tasks that the batch has taken from the list, in reverse.
    :ivar stored_as: set by a runner that keeps tasks, for the tasks that are added later.
    """

    __slots__ = ("_start_response", "front", "stored_as")

    # The server's function, which holds the environ; cleared when the request is over.
    _start_response: Any
    front: list[BackgroundTask] | None
    stored_as: Any  # a slot that most requests do not set
    phase: int  # a slot of the base class
    observer: Any  # of a test, or None: a class attribute of the subclasses

    has_waited: bool = False  # True for tasks whose batch the timer submits

    def __init__(self, tasks: Sequence[BackgroundTask] | None = None) -> None:
        super().__init__(tasks)
        self._start_response = self.front = None

    @property
    def tasks(self) -> list[BackgroundTask]:
        """See :attr:`BackgroundTasks.tasks`."""
        return self.left() if self.front else super().tasks

    def end_if_unused(self) -> bool:
        """End the batch if no task was added; True if the batch has ended.

        Called when the application has returned, if no thread has added a task so far.
        """
        self.phase = ENDED
        if self._list is None:
            self._start_response = None
            return True
        self.phase = OPEN  # added meanwhile
        return False

    def close(self) -> bool:
        """Close the batch, or end the batch if no task is left; True if the batch has ended."""
        self._start_response = None
        if self.phase != OPEN:
            return self.phase == ENDED
        if not self._list:
            self.phase = ENDED
            if not self._list:
                if self._list is not None:  # the view has run all its tasks by hand
                    self.may_start()
                return True
        self.phase = CLOSED
        return False

    def first(self) -> BackgroundTask | None:
        """Return the first task that is not done; if no task is left, end the batch."""
        if self.front:
            return self.front[-1]
        tasks = self._list
        if not tasks:
            self.phase = ENDED
            if not tasks:
                return None
            self.phase = CLOSED
        if len(tasks) > _LONG:
            # In this order each task is at every moment in at least one of the two lists.
            self.front = front = tasks[::-1]
            del tasks[: len(front)]
            return front[-1]
        return tasks[0]

    def stop(self) -> None:
        """Run no further task: a later ``add_task`` raises."""
        self.phase = ENDED

    def abandon(self) -> list[BackgroundTask]:
        """End the batch; claim and return the tasks that are left."""
        self.stop()
        return [task for task in self.left() if task.claim()]

    def may_start(self) -> bool:
        """Take the right to run the tasks; True for the first caller only."""
        return True

    def allow_start(self) -> None:
        """Let the tasks be run again, after they were offered to another process."""

    def begin_delay(self, task: BackgroundTask) -> None:
        """Let the delay of ``task`` begin, unless it has begun."""
        task.plan.is_due = True  # a list made by hand has no runner to run the task later

    def put_off(
        self,
        task: BackgroundTask,
        wait: float | None,
        status: int,
        *,
        holds_rest: bool,
        is_over: bool = False,
    ) -> Wait | None:
        """Prepare the wait of a claimed task, which runs in a batch of its own afterwards.

        :param wait: how long to wait, in seconds; None until the task's delay is over.
        :param status: the status of the request, for the tasks that the task adds.
        :param holds_rest: True if the tasks left in this list wait for the task, too.
        :param is_over: True if the tasks were named as unfinished: only a file can keep them.
        :return: None if no runner can run the task later, since the process ends or, for a
            further attempt, too many tasks wait.
        """
        return None

    def dropped(self, task: BackgroundTask) -> None:
        """``task`` will not run, since the attempt that has added it is repeated."""

    def skipped(self, task: BackgroundTask) -> None:
        """``task`` will not run, since the request or a task before has failed."""

    def tasks_of_attempt(self, task: BackgroundTask) -> list[BackgroundTask]:
        """The tasks that the last attempt of ``task`` has added, if no other follows them.

        Called on the thread that runs the tasks, right after the attempt. Looks at no other
        tasks: thousands may be left.
        """
        has_added = task.plan.has_added
        added = reversed(self._list or ())
        return [*takewhile(lambda each: has_added(context_of(each)), added)][::-1]

    def left(self) -> list[BackgroundTask]:
        """The tasks that are not done; may be called on any thread."""
        # In this order, since another thread may move tasks in first() meanwhile.
        added = [*(self._list or ())]
        front = self.front
        return list(dict.fromkeys([*front[::-1], *added])) if front else added

    def next_unclaimed(self) -> BackgroundTask | None:
        """The first task that is not claimed; called on the thread that runs the tasks.

        Makes no list, unlike :meth:`left`, since a batch asks after each run of async tasks.
        """
        for tasks in (reversed(self.front or ()), self._list or ()):
            for task in tasks:
                if task.unclaimed:
                    return task
        return None

    def length(self) -> int:
        """Approximate number of tasks that are not done; may be called on any thread."""
        return len(self.front or ()) + len(self._list or ())

    def drop(self, task: BackgroundTask) -> None:
        """Drop ``task``, the first task, which is done; on the thread that runs the tasks."""
        if self.front:
            self.front.pop()
        else:
            self.remove(task)


def context_of(task: BackgroundTask) -> Context | None:
    """Return the context in which ``task`` runs next; None if the task runs in it now."""
    plan = plan_of(task)
    return task.context if plan is None or plan.context is None else plan.context


class Wait(Protocol):
    """The wait of a task that has been prepared and not begun.

    :ivar moves_rest: True if the tasks left in the list wait with the task.
    """

    moves_rest: bool

    @property
    def begin(self) -> Callable[[], object]:
        """Begins the wait: called once, and runs no bytecode in which a signal could come."""


class View(BackgroundTasks):
    """A view on a list of tasks under different options: see :meth:`BackgroundTasks.using`.

    :param tasks: the object to view, which may be a view.
    """

    __slots__ = ("_root",)

    def __init__(self, tasks: BackgroundTasks, options: Options) -> None:
        self._list = None
        self._root = tasks.root
        self.options = options

    def _begin(self) -> list[BackgroundTask]:
        self._list = self._root.open_list()
        return self._list

    @property
    def tasks(self) -> list[BackgroundTask]:
        """See :attr:`BackgroundTasks.tasks`."""
        return self._root.tasks

    @property
    def phase(self) -> int:  # type: ignore[override]  # a slot in the base class: faster
        return self._root.phase

    @property
    def root(self) -> BackgroundTasks:
        return self._root

    def __call__(self) -> None:
        self._root()

    def __repr__(self) -> str:
        return f"<view of {self._root!r}>"


def _wrong_tasks(given: object) -> TaskTypeError:
    return TaskTypeError(
        f"tasks must be a list of BackgroundTask objects; got {safe_repr(given)}: write "
        "BackgroundTasks([BackgroundTask(function, ...)])",
        given,
    )


def _request_label(method: str, script_name: str | None, path_info: str | None) -> str:
    """Return method and path, without the query: ``"GET /orders/7"``.

    The path is that of the environ, which has bytes as Latin-1 text (PEP 3333).
    """
    path = f"{script_name or ''}{path_info or ''}"  # a sum would raise if one is no text
    if not path.isascii():
        path = path.encode("latin-1", "replace").decode("utf-8", "replace")
    return _shortened(f"{method} {path}")


def _shortened(label: str) -> str:
    """Return ``label``, at most 500 characters, with escapes for line breaks and controls."""
    return printable(label[:_LONGEST_LABEL])[:_LONGEST_LABEL]
