"""The errors that the package raises on purpose.

Each error is a :class:`WsgiBgError` and also the builtin exception that callers would expect.
Attributes carry the details for an exception handler.
"""

from __future__ import annotations

from typing import Any

from wsgi_bg._process.interrupts import safe_repr


class WsgiBgError(Exception):
    """Base of every error that wsgi_bg raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's method would call the class with the message as its arguments.
        return _restore, (type(self), *self.args), self.__dict__


def _restore(kind: type[WsgiBgError], *args: object) -> WsgiBgError:
    """Make an error of ``kind`` for a copy or a pickle; its attributes are set afterwards."""
    error = kind.__new__(kind, *args)
    super(WsgiBgError, error).__init__(*args)
    return error


class TaskTypeError(WsgiBgError, TypeError):
    """The object passed to ``add_task`` or ``BackgroundTask`` cannot run as a task.

    :ivar given: the object that was passed.
    """

    def __init__(self, message: str, given: object) -> None:
        super().__init__(message)
        self.given = given


class BatchEndedError(WsgiBgError, RuntimeError):
    """A task was added after the last task of its request had run.

    :ivar name: the name of the function that was not added.
    """

    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name} was not added: the tasks of this request have run and the batch "
            "has ended. Add tasks before the response is closed, or from a running task."
        )
        self.name = name


class EndlessTasksError(WsgiBgError, RuntimeError):
    """A hook, an ``on_error`` or a teardown has added a task each time a task ended.

    :ivar name: the name of the function that was not added.
    :ivar is_first: True for the first such error of a request; later errors are not logged.
    """

    def __init__(self, name: str, added: int, *, is_first: bool) -> None:
        super().__init__(
            f"{name} was not added: hooks, on_error or the teardown of an application context "
            f"have added {added} tasks of this request, each because the task before had "
            "ended, and would go on for ever. Let them add a task for "
            "requests only, and not for tasks."
        )
        self.name = name
        self.is_first = is_first


class WaitingLimitError(WsgiBgError, RuntimeError):
    """A task with a delay was not added, because too many tasks wait for their time.

    :ivar name: the name of the function that was not added.
    :ivar limit: how many tasks of a runner may wait in a process.
    """

    def __init__(self, name: str, limit: float) -> None:
        super().__init__(
            f"{name} was not added: {limit} tasks of this runner wait for their time already, "
            "which is max_waiting of its PoolRunner. Raise that, or keep what is to be done "
            "later in a database."
        )
        self.name = name
        self.limit = limit


class OutsideRequestError(WsgiBgError, RuntimeError):
    """``background_tasks`` or ``inject`` was used while no request is being handled."""


class InsideTaskError(WsgiBgError, RuntimeError):
    """``wait`` or ``drain`` was called from a background task, and would wait for that task.

    :ivar function: ``"wait"`` or ``"drain"``.
    """

    def __init__(self, function: str) -> None:
        super().__init__(
            f"wsgi_bg.{function}() was called from a background task or on the thread of the "
            "portal, and would wait for itself: call it from another thread"
        )
        self.function = function


class MiddlewareMissingError(WsgiBgError, LookupError):
    """The environ has no ``BackgroundTasks``: the middleware is not installed.

    :ivar key: the environ key that was looked up.
    """

    def __init__(self, key: str) -> None:
        super().__init__(
            f"environ has no {key!r}: wrap the application with "
            "wsgi_bg.BackgroundTasksMiddleware(app)"
        )
        self.key = key


class SharedPortalError(WsgiBgError, RuntimeError):
    """The portal of the process was entered or stopped, which would end it for all requests."""

    def __init__(self) -> None:
        super().__init__(
            "wsgi_bg.portal() is shared by all requests and ends with the process: use its "
            "call() and start_task_soon(), and neither stop() nor 'async with'"
        )


class ForkedPortalError(WsgiBgError, RuntimeError):
    """A forked child has used the portal of its parent, whose loop does not run there."""

    def __init__(self) -> None:
        super().__init__(
            "this portal belongs to the process that has forked this process: call "
            "wsgi_bg.portal() at each use, which returns the portal of the process"
        )


class UnsupportedServerError(WsgiBgError, RuntimeError):
    """The application is served by a server that wsgi_bg does not support.

    :ivar server: the server's name.
    """

    def __init__(self, server: str, instead: str) -> None:
        super().__init__(f"wsgi_bg does not work with {server}; serve with {instead}")
        self.server = server


class OptionError(WsgiBgError):
    """The value of an option is not accepted.

    :ivar option: the option's name.
    :ivar given: the value that was passed.
    :ivar wanted: a description of the accepted values.
    """

    def __init__(self, option: str, given: object, wanted: str) -> None:
        super().__init__(f"{option} must be {wanted}; got {safe_repr(given)}")
        self.option = option
        self.given = given
        self.wanted = wanted


class OptionTypeError(OptionError, TypeError):
    """The value of an option has the wrong type."""


class OptionValueError(OptionError, ValueError):
    """The value of an option is unknown or out of range."""


class InjectionError(WsgiBgError, TypeError):
    """A view has a parameter that the request's ``BackgroundTasks`` cannot be passed to.

    :ivar function: the name of the view's function.
    :ivar parameter: the name of the parameter.
    """

    def __init__(self, function: str, parameter: str, reason: str) -> None:
        super().__init__(f"the parameter {parameter!r} of {function} {reason}")
        self.function = function
        self.parameter = parameter


class InstalledTwiceError(WsgiBgError, RuntimeError):
    """The extension was installed a second time on the same application.

    :ivar app: the application's name.
    """

    def __init__(self, app: str) -> None:
        super().__init__(
            f"the Flask application {app!r} has wsgi_bg's Background already: call "
            "Background(app) or init_app(app) once"
        )
        self.app = app


class MainThreadError(WsgiBgError, RuntimeError):
    """``serve`` was called on a thread that cannot set signal handlers."""

    def __init__(self) -> None:
        super().__init__(
            "serve() stops on SIGTERM and SIGINT, and Python has signal handlers on the "
            "main thread only: call it there"
        )


class ExtraMissingError(WsgiBgError, ImportError):
    """A package that belongs to an extra is not installed.

    :ivar extra: the name of the extra.
    """

    def __init__(self, extra: str, wanted_by: str) -> None:
        super().__init__(
            f"{wanted_by} needs a package that is not installed: pip install 'wsgi_bg[{extra}]'"
        )
        self.extra = extra


class RegistrationError(WsgiBgError, TypeError):
    """``registered_task`` was called with a function that another process could not import.

    :ivar given: the object that was passed.
    """

    def __init__(self, message: str, given: object) -> None:
        super().__init__(message)
        self.given = given


class NameTakenError(WsgiBgError, ValueError):
    """The name for a registered function is already taken by a different task.

    :ivar name: the name.
    """

    def __init__(self, name: str, taken_by: str) -> None:
        super().__init__(f"the name {name!r} is taken by {taken_by}: register another name")
        self.name = name


class ArgumentError(WsgiBgError, TypeError):
    """An argument of a registered function cannot be sent to another process.

    :ivar name: the registered name of the function.
    :ivar argument: the argument, and the place inside it: ``order['items'][2]``. Empty if
        the function cannot be called with such arguments at all.
    """

    def __init__(self, name: str, argument: str, reason: str) -> None:
        where = f"argument {argument} cannot be sent" if argument else "it would not run"
        super().__init__(f"{name} was not added, {where}: {reason}")
        self.name = name
        self.argument = argument


class MessageError(WsgiBgError, ValueError):
    """A worker received a message whose arguments were not encoded by ``wsgi_bg``."""


class PlainCallError(WsgiBgError, TypeError):
    """Celery's ``delay()``, beat or a chain was to call a registered function.

    :ivar name: the registered name of the function.
    """

    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name} is a registered function, and only add_task sends it: "
            "CeleryRunner(..., plain_calls=True) lets Celery's own calls through, too"
        )
        self.name = name


class AsyncContextError(WsgiBgError, TypeError):
    """A hook has given no context manager, or an async one for a plain function.

    :ivar name: the name of the function, which was not called.
    """

    def __init__(self, name: str, given: object) -> None:
        super().__init__(
            f"around() of a hook has returned {safe_repr(given)} for {name}: return None, or "
            "a context manager, which may be async only for an async def function"
        )
        self.name = name


class UnsafeCeleryError(WsgiBgError, ValueError):
    """A Celery application has a setting with which a message could run any code.

    :ivar setting: the name of the setting.
    """

    def __init__(self, setting: str, value: object, instead: str) -> None:
        super().__init__(
            f"the Celery setting {setting} is {safe_repr(value)}, by which a message "
            f"could make a worker run any code: set {instead}"
        )
        self.setting = setting


class PublishError(WsgiBgError, ConnectionError):
    """A task could not be sent to the broker, or not within ``publish_timeout``.

    :ivar name: the registered name of the function.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} was not sent: {reason}")
        self.name = name


class OutboxFullError(WsgiBgError, RuntimeError):
    """A task was not added, because too many tasks wait to be sent to the broker.

    :ivar name: the name of the function that was not added.
    :ivar limit: the runner's ``max_unsent``.
    """

    def __init__(self, name: str, limit: int) -> None:
        super().__init__(
            f"{name} was not added: {limit} tasks wait to be sent already, and the broker does "
            "not take them. See if the broker runs, or raise max_unsent."
        )
        self.name = name
        self.limit = limit


class StoreError(WsgiBgError, RuntimeError):
    """A folder of durable tasks cannot be used, or a task could not be stored there.

    :ivar path: the folder, or the file in it.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"the durable tasks in {path!r}: {reason}")
        self.path = path
