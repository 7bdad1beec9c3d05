"""Injects the request's ``BackgroundTasks`` into the views of a Flask application.

A view that asks for the object is replaced in ``app.view_functions`` by a wrapper that
injects the object. All other views stay as they are, and cost nothing. (A URL value
preprocessor of Flask could inject the argument too, but costs each request 5 % and shows the
object to all readers of ``request.view_args``.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

from flask import Flask, request
from flask.views import MethodView, View, http_method_funcs

from wsgi_bg._request.injection import InjectedParameter, fill_injected, find_injected
from wsgi_bg._tasks.callables import name_of, signature_of
from wsgi_bg.exceptions import InjectionError

# The key of a handler for all methods: a function, or the dispatch_request of a class.
_ANY = ""


def inject_views(app: Flask) -> None:
    """Wrap the views of ``app`` that have injected parameters.

    Call this once, after all views are registered. A view whose parameter cannot be injected
    raises :exc:`InjectionError` when it is called.
    """
    views: dict[str, Any] = app.view_functions
    of_urls: dict[str, set[str]] = {}
    for rule in app.url_map.iter_rules():
        of_urls.setdefault(rule.endpoint, set()).update(rule.arguments)
    for endpoint, view in views.items():
        of_url = of_urls.get(endpoint, set())  # a view may have no rule
        try:
            injected = {
                method: wished
                for method, handler in _handlers_of(view).items()
                if (wished := _find_injected(handler, view, of_url))
            }
        except InjectionError as exc:
            views[endpoint] = fill_injected(view, functools.partial(_refuse, exc))
            continue
        if injected:
            views[endpoint] = fill_injected(view, functools.partial(_injected_now, injected))


def _refuse(exc: InjectionError) -> NoReturn:
    raise exc.with_traceback(None)  # else each call would lengthen the traceback


def _handlers_of(view: Any) -> dict[str, Callable[..., Any]]:
    """Return the functions that take a view's arguments, by the HTTP method they handle."""
    view_class = getattr(view, "view_class", None)
    if not isinstance(view_class, type) or not issubclass(view_class, View):
        return {_ANY: view}  # a mock has any attribute
    handlers: dict[str, Callable[..., Any]] = {_ANY: view_class.dispatch_request}
    if issubclass(view_class, MethodView):
        # A rule may name methods that the class does not.
        for method in http_method_funcs.union(map(str.lower, view_class.methods or ())):
            handler = getattr(view_class, method, None)
            if handler is not None:
                handlers[method] = handler
        if "get" in handlers:
            handlers.setdefault("head", handlers["get"])  # as MethodView.dispatch_request does
    return handlers


def _injected_now(injected: dict[str, list[InjectedParameter]]) -> list[InjectedParameter]:
    return injected.get(_ANY) or injected.get(request.method.lower(), [])


def _find_injected(
    handler: Callable[..., Any], view: Callable[..., Any], of_url: set[str]
) -> list[InjectedParameter]:
    injected, unresolved = find_injected(handler)
    name = name_of(handler)
    for parameter, error, is_ours in unresolved:
        if is_ours and parameter not in of_url and _reaches(handler, view, parameter):
            raise InjectionError(
                name,
                parameter,
                f"has an annotation that cannot be resolved ({error}): import what it names at "
                "the top of the module, and not under TYPE_CHECKING only",
            ) from error
    injected = [wanted for wanted in injected if _reaches(handler, view, wanted.name)]
    for wanted in injected:
        if wanted.name in of_url:
            raise InjectionError(
                name,
                wanted.name,
                "is annotated BackgroundTasks, and a value of the URL too: rename one of them",
            )
        if not wanted.by_name:
            raise InjectionError(
                name, wanted.name, "is positional only, and Flask gives arguments by name"
            )
    return injected


def _reaches(handler: Callable[..., Any], view: Callable[..., Any], name: str) -> bool:
    """True if the argument ``name`` reaches ``handler``: a decorator may not pass it on."""
    return _takes(view, name) and _takes(handler, name)


def _takes(func: Callable[..., Any], name: str) -> bool:
    """True if ``func``, including its decorators, can be called with ``name``."""
    try:
        parameters = signature_of(func, follow_wrapped=False).parameters
    except (TypeError, ValueError):  # functools.cache, in C, has no signature
        return True
    return name in parameters or any(
        parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()
    )
