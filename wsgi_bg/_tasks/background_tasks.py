"""``BackgroundTasks``: the calls of a request, in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from contextvars import Context, copy_context
from sys import modules
from typing import Any, ParamSpec

from wsgi_bg._loop.asgiref_state import detached
from wsgi_bg._process import per_process as process
from wsgi_bg._process.interrupts import stops_worker
from wsgi_bg._process.log import safe_repr
from wsgi_bg._tasks import successors, task_log
from wsgi_bg._tasks.options import DEFAULTS, OnError, Options
from wsgi_bg._tasks.task import BackgroundTask, RunOn
from wsgi_bg.exceptions import BatchEndedError, TaskTypeError

P = ParamSpec("P")

# The phases of a batch. OPEN: the request goes on. CLOSED: the request is over; the tasks
# wait or run, and may add further tasks. ENDED: no task will run any more.
OPEN, CLOSED, ENDED = range(3)

_LONG = 50  # tasks

_new_task = BackgroundTask.__new__


class BackgroundTasks:
    """The calls of a request, in order.

    In a request the middleware makes the object, and the tasks run after the response.
    An object made by hand is a list of calls, which :meth:`__call__` runs.

    :param tasks: tasks to begin with.
    :raises TypeError: if an item of ``tasks`` is not a :class:`BackgroundTask`.
    """

    __slots__ = ("_front", "_list", "_options", "_phase", "is_endless")

    is_endless: bool  # only if an endless row of tasks was cut: see wsgi_bg._tasks.successors
    _front: list[BackgroundTask] | None  # taken from the list by a batch, in reverse
    _list: list[BackgroundTask] | None
    _options: Options
    _phase: int

    def __init__(self, tasks: Sequence[BackgroundTask] | None = None) -> None:
        for task in tasks or ():
            if not isinstance(task, BackgroundTask):
                raise TaskTypeError(
                    f"tasks must be BackgroundTask objects; got {safe_repr(task)}: write "
                    "BackgroundTasks([BackgroundTask(function, ...)])",
                    task,
                )
        self._list = [task._owned(DEFAULTS) for task in tasks or ()]
        self._options = DEFAULTS
        self._front = None
        self._phase = OPEN

    @property
    def tasks(self) -> list[BackgroundTask]:
        """The tasks that are not done, in the order of ``add_task``.

        While the request goes on, this is the internal list and must only be read: a task
        that joins the list without :meth:`add_task` has no options and no context of this
        request, and runs in a single batch only. After the request this is a new list.
        """
        tasks = self._begin() if self._list is None else self._list
        return self._root._left() if self._root._front else tasks

    def add_task(self, func: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Add a call of ``func``, to run after all tasks added before.

        May be called on any thread of the request and in a running task; does not wait for
        any task. The task runs in a copy of the current context variables.

        :param func: a plain or ``async def`` function, called as ``func(*args, **kwargs)``.
        :raises TypeError: if ``func`` cannot run as a task.
        :raises RuntimeError: if the batch has ended.
        """
        options = self._options
        task = _new_task(BackgroundTask)
        task._fill(func, args, kwargs, copy_context(), options)
        tasks = self._list
        if tasks is None:
            tasks = self._begin()
        if options.is_watched or successors.logging:
            options.admit(task, self._root)
        tasks.append(task)
        # This side appends, then reads the phase. _first() sets the phase, then reads the
        # list. So at least one side sees the other's change, and _claim() decides.
        if self._phase == ENDED and task._claim():
            self._root._remove(task)
            task_log.notify_discarded(task, "the batch has ended")
            raise BatchEndedError(task.name)

    @property
    def _is_open(self) -> bool:
        """True if another middleware may still share this object."""
        return self._phase == OPEN

    @property
    def _root(self) -> BackgroundTasks:
        """The object that all views share; not a view itself."""
        return self

    @property
    def _layer(self) -> BackgroundTasks:
        """This object; in a view whose layer has returned, the object of an outer layer."""
        return self

    def _begin(self) -> list[BackgroundTask]:
        """Make the list, if ``__init__`` has not made it."""
        raise NotImplementedError

    # The run of the tasks, for wsgi_bg._tasks.batch. The batch drops each finished task, so
    # that a chain of tasks, each adding its successor for days, keeps a single task in memory.
    # A long list is emptied in a single step: deleting its first item moves all the rest.

    def _may_start(self) -> bool:
        """Take the right to run the tasks; True for the first caller only."""
        return True

    def _allow_start(self) -> None:
        """Let the tasks be run again, after they were offered to another process."""

    def _first(self) -> BackgroundTask | None:
        """Return the first task that is not done; if no task is left, end the batch."""
        if self._front:
            return self._front[-1]
        tasks = self._list
        if not tasks:
            self._phase = ENDED  # and look again: see add_task
            if not tasks:
                return None
            self._phase = CLOSED
        if len(tasks) > _LONG:
            # In this order each task is at every moment in at least one of the two lists.
            self._front = front = tasks[::-1]
            del tasks[: len(front)]
            return front[-1]
        return tasks[0]

    def _left(self) -> list[BackgroundTask]:
        """The tasks that are not done; may be called on any thread."""
        # In this order, since another thread may move tasks in _first() meanwhile.
        added = [*(self._list or ())]
        front = self._front or ()
        return list(dict.fromkeys([*front[::-1], *added]))

    def _next_unclaimed(self) -> BackgroundTask | None:
        """The first task that is not claimed; called on the thread that runs the tasks.

        Makes no list, unlike :meth:`_left`, since a batch asks after each run of async tasks.
        """
        for tasks in (reversed(self._front or ()), self._list or ()):
            for task in tasks:
                if task._unclaimed:
                    return task
        return None

    def _length(self) -> int:
        """Approximate number of tasks that are not done; may be called on any thread."""
        return len(self._front or ()) + len(self._list or ())

    def _drop(self, task: BackgroundTask) -> None:
        """Drop ``task``, the first task, which is done; on the thread that runs the tasks."""
        front = self._front
        if front:
            front.pop()
        else:
            self._remove(task)

    def _remove(self, task: BackgroundTask) -> None:
        """Drop a task that was run by hand or refused; may be called on any thread."""
        assert self._list is not None
        with suppress(ValueError):  # the batch has taken the task, and skips it
            self._list.remove(task)

    def _notify_failure(self, task: BackgroundTask, exc: BaseException) -> None:
        """Call the hooks and the ``on_error`` of a failed task, in the task's context."""
        task_log.notify_failure(task, exc)

    def _end(self) -> None:
        """Run no further task: a later ``add_task`` raises."""
        self._phase = ENDED

    def using(
        self,
        *,
        run_on: RunOn | None = None,
        failed_from: int | None = None,
        on_error: OnError | None = None,
        stop_on_error: bool | None = None,
        celery: Mapping[str, Any] | None = None,
    ) -> BackgroundTasks:
        """Return a view on the same list, whose ``add_task`` gives its tasks these options.

        An option that is None keeps its value. The options are those of
        :class:`~wsgi_bg.BackgroundTasksMiddleware`, and the options of a message to Celery.

        :param celery: options such as ``{"queue": "slow", "countdown": 60}``, which override
            the options of ``registered_task``. Runners without Celery ignore them, and so
            does a task that runs in this process because the broker cannot be reached.
        :raises ValueError: if ``run_on`` is none of ``"success"``, ``"error"``, ``"always"``,
            ``failed_from`` is not from 100 to 600, or ``celery`` has an unknown option.
        :raises TypeError: if ``failed_from`` is not a whole number, ``on_error`` is not a
            plain callable, or an option in ``celery`` is of the wrong type.
        """
        options = self._options.override(
            run_on=run_on,
            failed_from=failed_from,
            on_error=on_error,
            stop_on_error=stop_on_error,
            celery=celery,
        )
        return View(self._base, options)

    @property
    def _base(self) -> BackgroundTasks:
        """The object for views to refer to, so that a view of a view is no longer chain."""
        return self

    def __call__(self) -> None:
        """Run the tasks that have not run yet, each once; blocks until they are done.

        Plain functions run on the calling thread. The batch stays open: tasks added later
        run when the response is closed.

        :raises BaseException: the first error of a task, after all tasks have run; later
            errors are logged.
        """
        first: BaseException | None = None
        generation = process.generation
        while (task := self._claim_next()) is not None:
            context = self._context_of(task)
            try:
                task._call_in(context)
            except BaseException as exc:
                if stops_worker(exc) or process.generation != generation:
                    raise
                if first is None:
                    first = exc
                else:
                    context.run(task_log.log_failure, task, exc)
                    context.run(self._notify_failure, task, exc)
            if process.generation != generation:
                return  # in the child process that the task has forked
            self._remove(task)
        if first is not None:
            raise first

    def _claim_next(self) -> BackgroundTask | None:
        return next((task for task in self.tasks if task._claim()), None)

    def _context_of(self, task: BackgroundTask) -> Context:
        """Return the context to run ``task`` in, and clear the task's reference to it.

        A request's context refers to the tasks, through the variable of the proxy. The
        reference back would make a cycle that only the garbage collector could free.
        """
        context = task._context
        if context is None:
            context = copy_context()
        else:
            task._context = None
        return detached(context) if "asgiref.sync" in modules else context

    def __repr__(self) -> str:
        names = ", ".join(task.name for task in self.tasks)
        return f"<{type(self).__name__} [{names}]{' ended' if self._phase == ENDED else ''}>"


class View(BackgroundTasks):
    """A view on a list of tasks under different options: see :meth:`BackgroundTasks.using`.

    A middleware inside another middleware makes a view too. ``_has_returned`` is True if the
    application of that middleware has returned; the response may still stream.
    """

    __slots__ = ("_has_returned", "_is_layer", "_origin")

    def __init__(
        self, origin: BackgroundTasks, options: Options, *, is_layer: bool = False
    ) -> None:
        self._list = None
        self._front = None
        self._origin = origin
        self._options = options
        self._is_layer = is_layer
        self._has_returned = False

    @property
    def _base(self) -> BackgroundTasks:
        return self if self._is_layer else self._origin

    def _begin(self) -> list[BackgroundTask]:
        self._list = self._origin._begin() if self._origin._list is None else self._origin._list
        return self._list

    @property
    def _phase(self) -> int:  # type: ignore[override]  # a slot in the base class: faster
        return self._origin._phase

    @property
    def _root(self) -> BackgroundTasks:
        return self._origin._root

    @property
    def _layer(self) -> BackgroundTasks:
        return self._origin._layer if self._has_returned else self

    def __call__(self) -> None:
        self._origin()

    def __repr__(self) -> str:
        return f"<view of {self._origin!r}>"
