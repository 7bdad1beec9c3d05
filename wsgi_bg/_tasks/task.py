"""``BackgroundTask``: a call to make later."""

from __future__ import annotations

import os
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from contextvars import Context, ContextVar, copy_context
from functools import partial
from inspect import CO_COROUTINE
from sys import modules
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, Literal, ParamSpec
from weakref import WeakKeyDictionary, ref

from wsgi_bg._loop import portal
from wsgi_bg._loop.asgiref_state import detached
from wsgi_bg._loop.coroutines import is_awaitable
from wsgi_bg._process.interrupts import is_raised_here, stops_worker
from wsgi_bg._process.per_process import PerProcess
from wsgi_bg._tasks.callables import NOT_PLAIN, is_async_callable, name_of

if TYPE_CHECKING:
    from wsgi_bg._tasks.checks import WhenUnsent
    from wsgi_bg._tasks.retry import Plan, Retry

P = ParamSpec("P")


RunOn = Literal["success", "error", "always"]

CRASHED = 1000
"""In place of a status code if the application raised; counts as failed for each option."""


current: ContextVar[Any] = ContextVar("wsgi_bg.current")
"""The ``BackgroundTasks`` of the request, while the application callable runs and in its tasks.

The variable cannot be set for a streamed body: each chunk is made in the server's context."""

RESULT = "result"

Done = defaultdict[Any, Any] | None


class Queued(deque[Any]):
    """In place of the result of a task whose call another process makes.

    ``partial(Queued, map(operator.call, steps), 0)`` takes the steps and returns this without
    a bytecode, so that no signal handler comes between.
    """

    __slots__ = ()


SENT = Queued()
"""In place of the result of a task that was sent. Another ``Queued``: it waits to be sent."""


class WasQueued(Exception):  # noqa: N818  # not an error
    """Raised in place of a :class:`Queued`, where a coroutine could not return it."""

    def __init__(self, *, is_sent: bool = False) -> None:
        self.is_sent = is_sent


class WasDiscarded(Exception):  # noqa: N818  # not an error
    """Raised by :meth:`Caller.make` if no call was made: the task was discarded by hand."""


Queue = Callable[[], Queued]
"""Puts a task into a queue of tasks to send; called once."""

_ids: dict[ref[BackgroundTask], str] = {}
"""The ids of the tasks whose id was asked for in this process. The references call ``pop()``: a
``WeakKeyDictionary`` takes twice the time for an id."""

_ids_of_parents: list[dict[ref[BackgroundTask], str]] = []
"""The same of the processes that have forked this one, which does not run their tasks."""


def _forget_parent() -> None:
    """Know the tasks of the parent no more, in a forked child; they keep their ids."""
    global _ids
    if _ids:
        _ids_of_parents.append(_ids)
        _ids = {}


os.register_at_fork(after_in_child=_forget_parent)

_names: WeakKeyDictionary[BackgroundTask, str] = WeakKeyDictionary()
"""The names of the tasks that an engine knows by its own means."""


_IDS_AT_ONCE = 256

_next_ids: PerProcess[list[str]] = PerProcess(list)
"""Ids for the next tasks. ``os.urandom()`` releases the GIL: with tasks on other threads, a
request would wait 30 us for each id to get the GIL back."""


def _new_id() -> str:
    """A random UUID of version 4; ``str(uuid4())`` takes 3.2 us."""
    ready = _next_ids.get()
    try:
        return ready.pop()
    except IndexError:
        text = os.urandom(16 * _IDS_AT_ONCE).hex()
        new_id, *others = [_id_of(text[at : at + 32]) for at in range(0, len(text), 32)]
        ready.extend(others)
        return new_id


def _id_of(text: str) -> str:
    return f"{text[:8]}-{text[8:12]}-4{text[13:16]}-a{text[17:20]}-{text[20:]}"


def known_id(task: BackgroundTask) -> str | None:
    """The id of the task; None if nobody has read the id."""
    return _ids.get(ref(task)) if _ids else None  # most processes have no id


def tasks_with_ids(wanted: str | None = None) -> list[tuple[BackgroundTask, str]]:
    """The tasks whose id was read, with their ids.

    :param wanted: only tasks with this id.
    """
    # copy() is a single atomic step. A list of the items is none: each item is a new tuple, for
    # which the garbage collector may run, and then other threads and finalizers.
    return [
        (task, id)
        for reference, id in _ids.copy().items()  # noqa: A001
        if (wanted is None or id == wanted) and (task := reference()) is not None
    ]


class Caller:
    """Calls tasks directly; base class of callers that observe tasks, or send them away."""

    __slots__ = ()

    around: Any = None  # makes the context of an application, in which the calls are made
    hooks: Any = ()  # a tuple of wsgi_bg.hooks.Hooks objects
    ends_in_context: bool = True  # False if finished() may be called outside of the context

    def without_around(self) -> Caller:
        """The same caller without :attr:`around`; called only if there is one."""
        raise NotImplementedError

    def received(self, task: BackgroundTask, batch: Any) -> None:
        """``task`` of another process is in ``batch``, a ``BackgroundTasks``."""

    def added(self, task: BackgroundTask, batch: Any) -> None:
        """``task`` is about to join ``batch``, a ``BackgroundTasks``."""

    def joined(self, task: BackgroundTask, batch: Any) -> None:
        """``task`` has joined ``batch``."""

    def sends_delayed(self, task: BackgroundTask) -> bool:
        """True if :meth:`send` may be called before the time of a task with a delay."""
        return False

    def send(self, task: BackgroundTask) -> bool | Queue:
        """Send the task to another process; True if the task was sent.

        :return: a function if the caller has to call it in order to have the task sent.
        """
        return False

    def send_or_make(self, task: BackgroundTask, done: Done) -> Any:
        """Send the task; if the task is not sent, make the call as :meth:`make` does."""
        return self.make(task, done)

    def make(self, task: BackgroundTask, done: Done) -> Any:
        """Make the call of ``task`` in the current context and return its result.

        :param done: given on a thread that runs signal handlers. Its ``default_factory`` makes
            the call and stores the result under RESULT, with no bytecode, and so no handler,
            between call and store.
        :raises WasDiscarded: if the call must not be made; the hooks were called already.
        :raises BaseException: the error of the call.
        """
        if done is None:
            return task.func(*task.args, **task.kwargs)
        # An empty ** costs 0.1 us.
        done.default_factory = (
            partial(task.func, *task.args, **task.kwargs)
            if task.kwargs
            else partial(task.func, *task.args)
        )
        return done[RESULT]

    def watch(self, batch: Any, tasks: Any, hooks: Sequence[Any], in_front: int) -> None:
        """Let hooks watch ``batch``, a ``Batch``, of ``tasks``, a ``BackgroundTasks``."""

    def sent(self, task: BackgroundTask) -> None:
        """``task`` was sent from a queue, some time after :meth:`send`."""

    def finished(self, task: BackgroundTask) -> None:
        """``task`` has returned; an awaitable that its function returned was awaited."""

    def raised(self, task: BackgroundTask) -> None:
        """The call of ``task`` has just raised; the error is not logged yet."""

    def stopped(self, task: BackgroundTask, exc: BaseException, batch: Any) -> None:
        """The tasks after ``task`` will not run: it raised ``exc`` under ``stop_on_error``.

        Called before :meth:`failed`.

        :param batch: a ``BackgroundTasks``.
        """

    def failed(self, task: BackgroundTask, exc: BaseException) -> None:
        """``task`` has raised ``exc``."""

    def retried(self, task: BackgroundTask, exc: BaseException, seconds: float) -> None:
        """``task`` has raised ``exc`` and will be called again in ``seconds``."""

    def moved(self, task: BackgroundTask, copy: BackgroundTask, batch: Any) -> None:
        """``copy`` in ``batch``, a ``BackgroundTasks``, will run in place of ``task``."""

    def discarded(self, task: BackgroundTask, reason: str) -> None:
        """``task`` will not run, or was interrupted."""

    def forget(self, task: BackgroundTask) -> None:
        """``task`` will not run, in no process."""


DIRECT: Caller = Caller()
"""The caller of tasks that nothing observes."""


class Layer:
    """The layer of middleware in which a task was added.

    This class itself is the layer of a task that was made by hand, and of a task that joined
    the list of a request without ``add_task``.

    :ivar run_on: after which requests the tasks run.
    :ivar failed_from: the lowest status that counts as a failure.
    :ivar calls: calls the tasks.
    :ivar on_error: called with a task and its error.
    :ivar stop_on_error: True if a task's error skips the rest of the batch.
    :ivar celery: options for Celery, ignored by every runner but ``CeleryRunner``.
    :ivar engine: options for the engine of the runner, which checks them.
    :ivar retry: when a task is called again after an error; None for the function's own.
    :ivar delay: how long a task waits after the request, in seconds.
    :ivar when_unsent: for a task that cannot be sent to another process.
    """

    __slots__ = ()

    run_on: RunOn = "success"
    failed_from: int = 500
    calls: Caller = DIRECT
    on_error: Callable[[BackgroundTask, BaseException], Any] | None = None
    stop_on_error: bool = False
    celery: Mapping[str, Any] | None = None
    engine: Mapping[str, Any] | None = None
    retry: Retry | None = None
    delay: float = 0.0
    when_unsent: WhenUnsent | None = None

    def of_layer(self, default: Layer) -> Any:
        """The options of the layer, without those of ``using``; ``default`` without a layer."""
        return default

    def lets_run(self, status: int) -> bool:
        """True if a task runs after a request of this outcome.

        :param status: the status code of the response; 0 if there was none, CRASHED if the
            application raised.
        """
        return self.run_on == "always" or (self.run_on == "error") == (
            status >= self.failed_from
        )

    def why_not_run(self, status: int) -> str:
        """Return the reason why :meth:`lets_run` is False, for logs and hooks."""
        outcome = "failed" if status >= self.failed_from else "succeeded"
        if status and status != CRASHED:
            outcome += f" with {status}"
        return f"the request {outcome}, and run_on is {self.run_on!r}"


_NO_LAYER = Layer()

_EMPTY: list[Any] = []  # always empty; of claimed tasks, and of tasks without a record


def plan_of(task: BackgroundTask) -> Plan | None:
    """The plan of a task; None if the task has neither a delay nor a ``Retry``."""
    return getattr(task, "plan", None)


class BackgroundTask:
    """A call to make later.

    :param func: a plain or ``async def`` function, or anything callable. Positional
        only, so that ``kwargs`` may have any name.
    :raises TypeError: if ``func`` cannot run as a task, because ``func`` is not callable, a
        generator function, or a coroutine object.

    :ivar func: the function to call.
    :ivar args: positional arguments of the call.
    :ivar kwargs: keyword arguments of the call.
    :ivar is_async: True if ``func`` is known to return an awaitable: an ``async def``
        function, a :func:`functools.partial` of an async function, an object with an async
        ``__call__``. An awaitable that any other function returns is awaited too.
    :ivar options: the options of the layer or view in which the task was added, for runners.
    :ivar message: the result of the runner's ``check``, until ``send`` gets the message.
    """

    # The attributes and methods that this docstring does not name are the package's own.

    __slots__ = (
        "__weakref__",
        "_root",
        "_unowned",
        "args",
        "context",
        "func",
        "generation",
        "is_async",
        "kwargs",
        "message",
        "options",
        "plan",
        "record",
        "unclaimed",
    )

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    is_async: bool
    options: Layer
    message: Any
    context: Context | None  # to run in; None for a task made by hand, and once the task runs
    unclaimed: list[None]  # emptied by claim()
    generation: int  # see wsgi_bg._tasks.successors
    plan: Plan  # only of a task with a delay or a Retry: see plan_of()
    record: list[Any]  # holds the record that the hooks get until the task has ended
    _root: Any  # only if the task was given up while it ran
    _unowned: list[None]  # only if the task was made by hand

    def __init__(self, func: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs) -> None:
        fill(self, func, args, kwargs, None, _NO_LAYER)
        self._unowned = [None]

    @property
    def name(self) -> str:
        """``module.qualname`` of the function, for logs; for an engine's own task, its name."""
        known = _names.get(self) if _names.data else None  # type: ignore[attr-defined]
        return known or name_of(self.func)

    def keep_name(self, name: str) -> None:
        """Take the name of an engine's own task, whose function may be the engine's."""
        _names[self] = name

    @property
    def id(self) -> str:
        """The id of the task, a text that no other task has.

        Made when the id is read, stored or sent for the first time. An engine that sends the
        task has the same id, and so have the further attempts of the task.
        """
        known = _ids.get(ref(self))
        if known is None:
            for ids in _ids_of_parents:
                if ref(self) in ids:
                    return ids[ref(self)]
            # A single atomic operation: two threads get the same id.
            known = _ids.setdefault(ref(self, _ids.pop), _new_id())
        return known

    def keep_id(self, id: str) -> None:  # noqa: A002
        """Take the id of the repeated task, before another thread can read an id here."""
        _ids[ref(self, _ids.pop)] = id

    @property
    def request(self) -> str | None:
        """The label of the task's request: method and path, unless ``request_label`` is given.

        Known from the end of the request on, in ``on_error`` and in the task itself. On a
        worker: method and path, or None if there is a ``request_label``.
        """
        root = self.root
        return None if root is None else root.request

    @property
    def root(self) -> Any:
        """The ``BackgroundTasks`` of the request; None if the context knows none."""
        try:
            return self._root
        except AttributeError:
            context = self.context  # None once the task runs, in that context
            inside = current.get(None) if context is None else context.get(current)
            return None if inside is None else inside.root

    def keep_root(self, root: Any) -> None:
        """Keep the ``BackgroundTasks`` of the request: the task is about to be given up."""
        self._root = root

    @property
    def attempt(self) -> int:
        """The number of this call: 1, or more if the task is called again after an error."""
        plan = plan_of(self)
        return 1 if plan is None else plan.attempt

    def __call__(self) -> Any:
        """Make an extra call now and return its result; blocks until the call is done.

        The request runs the task all the same.

        A plain function runs on the calling thread, an awaitable on the portal's thread. If
        the task was added to a batch, the call runs in a copy of the context of that moment.
        A delay and a ``Retry`` do not hold for this call. Hooks and the status see the call as
        a task of its own, with another id.

        :raises BaseException: the error of the call.
        :raises RuntimeError: for an async call from the portal's own thread.
        """
        context = self.context
        # A copy: the run by the request sees no variable that this call sets, and no span.
        context = self.new_context() if context is None else context.copy()
        task = self if self.options.calls is DIRECT else self._extra()
        return task.call_in(detached(context))

    def _extra(self) -> BackgroundTask:
        """A task for an extra call: the run by the request needs the record of this one."""
        task = BackgroundTask.__new__(BackgroundTask)
        fill(task, self.func, self.args, self.kwargs, None, self.options)
        root = self.root
        if root is not None:
            self.options.calls.received(task, root)
        return task

    def call_in(self, context: Context) -> Any:
        """Make the call in ``context``: see :meth:`__call__`."""
        calls = self.options.calls
        try:
            result = self._finish(context, context.run(calls.make, self, None))
        except BaseException as exc:
            if calls is DIRECT:  # nothing observes: and the context may still be entered
                raise
            if stops_worker(exc):  # the loop may still run in this context
                calls.discarded(self, f"{type(exc).__name__} stopped its worker")
            else:
                context.run(calls.failed, self, exc)
            raise
        context.run(calls.finished, self)
        return result

    def _finish(self, context: Context, result: Any) -> Any:
        """Return ``result``; if ``result`` is awaitable, await it and return its result."""
        if result is not None and is_awaitable(result):
            result, error = portal.wait_for(context, result)
            if error is not None:
                try:
                    raise error
                finally:
                    del error  # or it refers to itself, by this frame
        return result

    def claim(self) -> bool:
        """Claim the right to run or log this task; True for a single caller only.

        ``list.pop`` is an atomic operation on every Python, also on free-threaded builds
        (deleting a slot is not atomic before 3.14.5). Unlike a lock, an interrupted pop
        leaves nothing locked for a signal handler or a fork.
        """
        try:
            self.unclaimed.pop()
        except IndexError as exc:
            if not is_raised_here(exc):
                raise
            return False
        self.free_claim()
        return True

    def free_claim(self) -> None:
        """Free the list that the claim has emptied."""
        self.unclaimed = _EMPTY

    def unclaim(self) -> None:
        """Give the claim back; called only by the thread that has the claim."""
        self.unclaimed = [None]

    def take_context(self, batch: Any = None) -> Context:
        """Return the context to run in, and clear the task's reference to the context.

        Must be called on the thread that will run the task. A request's context refers to the
        tasks, through the variable of the proxy. The reference back would make a cycle that
        only the garbage collector could free.

        :param batch: the ``BackgroundTasks`` of the request, for which the proxy stands in the
            context; None to leave the proxy as it is.
        """
        context = self.context
        if context is None:
            context = self.new_context()
            plan = plan_of(self)
            if plan is not None:
                plan.calls += 1
        else:
            self.context = None
        if "asgiref.sync" in modules:
            context = detached(context)
        if batch is not None:
            inside = context.get(current)
            if inside is not batch and (inside is None or inside.root is not batch):
                # The task was added in a stream or on another thread.
                context.run(current.set, batch.as_seen_in(self.options))
        return context

    def new_context(self) -> Context:
        """Return the context of a task whose ``context`` is None."""
        plan = plan_of(self)
        return copy_context() if plan is None or plan.context is None else plan.begin()

    def keep_context(self) -> None:
        """Let each attempt begin with the context of now: the task has a ``Retry``."""
        self.plan.context = self.context
        self.context = None

    def successor(self) -> BackgroundTask:
        """Return a copy that can be claimed, for the batch that runs the task later."""
        task = BackgroundTask.__new__(BackgroundTask)
        fill(task, self.func, self.args, self.kwargs, self.context, self.options)
        plan = plan_of(self)
        if plan is not None:
            task.plan = plan
        task.generation = self.generation
        task.message = self.message
        task.keep_id(self.id)
        if self in _names:
            task.keep_name(self.name)
        return task

    def owned(self, options: Layer) -> BackgroundTask:
        """Return this task for a new batch, or a copy if another batch owns this task."""
        try:
            self._unowned.pop()
        except (AttributeError, IndexError):
            task = BackgroundTask.__new__(BackgroundTask)
            fill(task, self.func, self.args, self.kwargs, copy_context(), options)
            return task
        self.context = copy_context()
        self.options = options
        return self

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"


def fill(
    task: BackgroundTask,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: Context | None,
    options: Layer,
) -> None:
    """Set the attributes of a new task: the ``__init__`` of a task of a batch.

    :raises TypeError: if ``func`` cannot run as a task.
    """
    flags = NOT_PLAIN
    if type(func) is FunctionType or (
        type(func) is MethodType and type(func.__func__) is FunctionType
    ):
        flags = func.__code__.co_flags & NOT_PLAIN
    if flags == 0:
        task.is_async = False
    elif flags == CO_COROUTINE:
        task.is_async = True
    else:
        task.is_async = is_async_callable(func)
    task.func = func
    task.args = args
    task.kwargs = kwargs
    task.context = context
    task.options = options
    task.unclaimed = [None]
    task.generation = 0
    task.message = None
    task.record = _EMPTY
