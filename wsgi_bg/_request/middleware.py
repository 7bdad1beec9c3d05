"""``BackgroundTasksMiddleware``: how a request gets its tasks, and when they are run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from types import GeneratorType
from typing import TYPE_CHECKING, Literal, NamedTuple

from wsgi_bg._durable.keeping import KeepingApp
from wsgi_bg._process import log
from wsgi_bg._request.body import Body, GeneratorBody, SizedBody
from wsgi_bg._request.calls import Around
from wsgi_bg._request.layer import (
    LayerView,
    OptionOverrides,
    check_status,
    innermost_running,
    merge_options,
)
from wsgi_bg._request.observer import observers
from wsgi_bg._request.request_tasks import ObservedTasks, RequestTasks
from wsgi_bg._request.servers import is_asked_for, refuse_eventlet
from wsgi_bg._request.unclosed import ABANDONED, RAISED, Outcome, on_first_task
from wsgi_bg._status.recorder import recorder
from wsgi_bg._tasks.background_tasks import OPEN, BackgroundTasks
from wsgi_bg._tasks.callables import is_coroutine_callable, is_plain
from wsgi_bg._tasks.current import ENVIRON_KEY
from wsgi_bg._tasks.options import OnError, Options
from wsgi_bg._tasks.retry import wait
from wsgi_bg._tasks.task import RunOn, current
from wsgi_bg.exceptions import OptionTypeError
from wsgi_bg.hooks.base import Hooks, OptionHooks
from wsgi_bg.runners import Runner, resolve
from wsgi_bg.runners.keeping import keeps_tasks
from wsgi_bg.runners.ledger import LedgerRunner

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

# Python makes a bound method for each call of a method of an imported name: for these two
# calls that takes a tenth of the time that the middleware adds to a request.
_set_current, _reset_current = current.set, current.reset

# The middleware of a forked child may have had its first request in the parent.
on_first_task.append(recorder.start)


def _body_class(app_iter: object) -> type[Body]:
    # A function, so that a request with tasks takes no branch in the middleware's try.
    if type(app_iter) is GeneratorType:
        return GeneratorBody
    return SizedBody if isinstance(app_iter, (list, tuple)) else Body


class _MergedOptions(NamedTuple):
    """Options of the outer middleware, and these options merged with the inner middleware's."""

    root: Options
    outer: Options
    new_root: Options
    inner: Options


class BackgroundTasksMiddleware:
    """Gives each request a ``BackgroundTasks`` and runs its tasks after the response.

    A task runs after the response and never delays the response. If the server has written
    the whole response before the server calls ``close()``, the runner may run the task in
    ``close()``; otherwise the task is handed over to a thread. A task that raises is logged
    and passed to ``on_error``, and the next task runs.

    If another ``BackgroundTasksMiddleware`` is installed further out, both share one
    ``BackgroundTasks``. Options of the inner middleware that are not None apply to the tasks
    added inside it, and the outer middleware decides when the tasks run.

    :param app: the WSGI application. Install the middleware outermost.
    :param runner: a runner, or ``"inline"`` (the default) or ``"pool"`` for the process's
        shared runner of that kind.
    :param run_on: ``"success"`` (the default) runs tasks only if the request did not fail,
        ``"error"`` only if it did, ``"always"`` in both cases. A request fails if the
        application raises or answers with a status of ``failed_from`` or more.
    :param failed_from: the lowest status that counts as a failure, from 100 to 600
        (default 500): with 400 ``abort(404)`` is a failure, with 600 no response is.
    :param on_error: called with a task and its exception, on the thread that ran the task.
    :param stop_on_error: True if a task's error skips the rest of the batch (Starlette's
        rule; default False).
    :param hooks: a :class:`~wsgi_bg.hooks.Hooks` object, or a list of them, called when a
        task is added, started, finished, failed and discarded.
    :param request_label: called with the environ at the end of a request that has added tasks,
        or when a runner stores them; returns how logs, hooks and the status name the request.
        Default: method and path, without the query.
    :param slow_after: a task that still runs after so many seconds is logged once an attempt at
        WARNING, with the stack of its thread or coroutine (not under gevent).
    :param status: True to record the status of the tasks, for :mod:`wsgi_bg.status`.
    :param status_path: the path of a folder on a local disk, made if there is none, in which
        all processes that are given this path write their status; implies ``status=True``.
    :raises TypeError: if ``app`` is not callable, or is an ASGI application, or an option is of
        the wrong type.
    :raises ValueError: if ``runner`` or ``run_on`` is an unknown word, or
        ``failed_from`` is out of range, or the folder ``status_path`` cannot be used.
    """

    # A framework's middleware sets this to wrap the call of each task.
    _around: Around | None = None
    # True if the runner is only a default, which an inner middleware may replace.
    _runner_is_default = False

    def __init__(
        self,
        app: WSGIApplication,
        *,
        runner: Runner | Literal["inline", "pool"] | None = None,
        run_on: RunOn | None = None,
        failed_from: int | None = None,
        on_error: OnError | None = None,
        stop_on_error: bool | None = None,
        hooks: Hooks | Sequence[Hooks] | None = None,
        request_label: Callable[[WSGIEnvironment], str] | None = None,
        slow_after: float | None = None,
        status: bool | None = None,
        status_path: str | os.PathLike[str] | None = None,
    ) -> None:
        if not callable(app) or is_coroutine_callable(app):
            wanted = "a WSGI application: app(environ, start_response), and not async"
            raise OptionTypeError("app", app, wanted)
        self._wrapped = app
        self._app: WSGIApplication = self._handle_first
        self._overrides = OptionOverrides(
            run_on=run_on,
            failed_from=failed_from,
            on_error=on_error,
            stop_on_error=stop_on_error,
        )
        self._hooks = hooks
        self._merged: _MergedOptions | None = None
        self._names_runner = runner is not None
        self._has_warned = False
        resolved = resolve(runner)
        if request_label is not None and not (
            callable(request_label) and is_plain(request_label)
        ):
            wanted = "a plain function that takes the environ and returns a text"
            raise OptionTypeError("request_label", request_label, wanted)
        self._request_label = request_label
        self._option_hooks: list[OptionHooks] = []
        if check_status(status, status_path):
            self._option_hooks.append(recorder)
        if slow_after is not None:
            self._option_hooks.append(_slow_tasks(slow_after))
        options = self._merge(Options(), resolved)
        self._options = replace(
            options,
            runner_is_default=self._runner_is_default,
            request_label=request_label,
        )
        self._inner = app
        if isinstance(resolved, LedgerRunner):
            resolved.attach(self._options)
        if (self._options.calls.hooks or self._options.check) and request_label is None:
            self._inner = app = _noting_request(app)
        if keeps_tasks(resolved):
            self._inner = KeepingApp(app, resolved)

    def __call__(
        self, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        """Handle a request: PEP 3333's application side.

        :raises RuntimeError: under eventlet, which is not supported.
        """
        if ENVIRON_KEY in environ:
            outer = environ[ENVIRON_KEY]
            if isinstance(outer, BackgroundTasks) and outer.phase == OPEN:
                return self._handle_inner(outer, environ, start_response)

        observe = observers.observe
        if observe is None:
            tasks = RequestTasks(self._options, start_response)
        else:
            tasks = ObservedTasks(self._options, start_response, observe, environ)
        environ[ENVIRON_KEY] = tasks
        token = _set_current(tasks)
        app = self._app
        try:
            try:
                app_iter = app(environ, tasks.start_response)
                kind = type(app_iter)
                if (
                    not tasks.is_used
                    and (
                        kind is list
                        or kind is tuple
                        or kind is environ.get("wsgi.file_wrapper")
                    )
                    and tasks.end_if_unused()
                ):
                    # Return the iterable unwrapped: no code in such an iterable could add a
                    # task, and a server sends its own file wrapper without iterating.
                    return app_iter
                if kind is object:
                    # gunicorn's asynchronous workers compare the iterable with ALREADY_HANDLED.
                    tasks.end(environ, ABANDONED)
                    return app_iter
                body = _body_class(app_iter)(app_iter, environ, tasks)
            except:
                # This clause names no class, and above no condition is true for a request with
                # tasks: on Python 3.15 an exception that a tracer raises right after a match or
                # a true condition passes the enclosing try by.
                tasks.end(environ, _outcome_of(environ, sys.exception(), tasks))
                raise
        except BaseException:
            # Once more: a signal handler may have raised before the first end() had begun.
            tasks.end(environ, RAISED)
            raise
        finally:
            _reset_current(token)
        if observe is None:
            return body
        assert tasks.observer is not None
        return tasks.observer.respond(body)

    def _handle_first(
        self, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        """Check the server, then call the application; replaced once the check has passed."""
        refuse_eventlet(environ)
        recorder.start()
        self._app = self._inner
        return self._inner(environ, start_response)

    def _handle_inner(
        self, tasks: BackgroundTasks, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        """Handle a request whose tasks an outer middleware runs."""
        tasks = innermost_running(tasks)
        root = tasks.root
        merged = self._merged
        if (
            merged is None
            or merged.root is not root.options
            or merged.outer is not tasks.options
        ):
            self._merged = merged = self._merge_options(root.options, tasks.options)
            runner = merged.new_root.runner
            if isinstance(runner, LedgerRunner):
                runner.attach(merged.inner)
        root.options = merged.new_root
        inner = tasks if merged.inner is tasks.options else LayerView(tasks, merged.inner)
        environ[ENVIRON_KEY] = inner
        token = _set_current(inner)
        app_iter: Iterable[bytes] = ()
        try:
            app_iter = self._app(environ, start_response)
            return app_iter
        finally:
            _reset_current(token)
            if type(app_iter) in (list, tuple):
                environ[ENVIRON_KEY] = tasks
            elif isinstance(inner, LayerView) and inner is not tasks:
                # A stream finds its options in the environ until the stream is closed. A
                # second application that is called with this environ does not find them.
                inner.has_returned = True

    def _merge_options(self, root: Options, outer: Options) -> _MergedOptions:
        """Merge the outer options with those of this middleware; each request gets the same."""
        runner = None
        own = self._options
        if self._names_runner and root.runner_is_default:
            runner = own.runner
        elif own.check is not None and own.runner is not root.runner and not self._has_warned:
            # A runner that keeps tasks, or sends them: its promise does not hold.
            self._has_warned = True
            log.warning(
                "%s does not run the tasks, since %s of an outer middleware does: give the "
                "runner to the outermost one (said once)",
                own.runner,
                root.runner,
            )
        new_root = root if runner is None else merge_options(root, runner=runner)
        if self._request_label is not None:
            new_root = replace(new_root, request_label=self._request_label)
        return _MergedOptions(root, outer, new_root, self._merge(outer, runner))

    def _merge(self, outer: Options, runner: Runner | None) -> Options:
        return merge_options(
            outer, self._overrides, self._hooks, self._around, runner, self._option_hooks
        )

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._wrapped!r}, {self._options.runner!r}>"


def _slow_tasks(slow_after: float) -> OptionHooks:
    wait("slow_after", slow_after)
    from wsgi_bg.hooks.slow import SlowTasks

    return SlowTasks(slow_after)


def _noting_request(app: WSGIApplication) -> WSGIApplication:
    """Let hooks and messages know the request of a task before the request ends."""

    def noting(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        tasks = environ[ENVIRON_KEY].root
        # The function of an outer layer is called at the end, for requests with tasks only.
        if tasks.options.request_label is None:
            tasks.note_request(environ)
        return app(environ, start_response)

    return noting


def _outcome_of(
    environ: WSGIEnvironment, exc: BaseException | None, tasks: RequestTasks
) -> Outcome:
    if exc is not None and (is_asked_for(environ, exc) or tasks.has_lost_client(exc)):
        return ABANDONED
    return RAISED
