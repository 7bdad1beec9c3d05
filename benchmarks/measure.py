"""Times several callables in turns, so that a slow machine slows all of them equally."""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterable, Mapping
from timeit import Timer
from types import FunctionType
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])

App = Callable[[dict[str, Any], Any], Iterable[bytes]]

HEADERS = [("Content-Length", "2")]


options = argparse.Namespace(rounds=36)
"""The command line's numbers; defaults until the command line is parsed."""


def in_turns(*subjects: Callable[[], float], rounds: int | None = None) -> list[float]:
    """Return the median of the times that each subject returns."""
    taken: list[list[float]] = [[] for _ in subjects]
    gc.disable()
    try:
        for turn in range(rounds or options.rounds):
            gc.collect()
            for place in range(len(subjects)):
                # Rotate: the first subject after the collection finds cold caches.
                number = (turn + place) % len(subjects)
                taken[number].append(subjects[number]())
    finally:
        gc.enable()
    return [statistics.median(times) for times in taken]


def interleave(*subjects: Callable[[], object], calls: int) -> list[float]:
    """Return the median time of a call for each subject, in microseconds."""

    def timed(subject: Callable[[], object]) -> Callable[[], float]:
        timer = Timer(subject)
        return lambda: timer.timeit(calls) / calls * 1e6

    for subject in subjects:
        subject()
    return in_turns(*map(timed, subjects))


def time_calls(
    start: Callable[[], Callable[[], object]],
    calls: int,
    finish: Callable[[], object] = lambda: None,
) -> Callable[[], float]:
    """Return a function that returns the median time of a call, in microseconds.

    :param start: called before each call, and returns the function to call.
    :param finish: called after each call.
    """

    def measured() -> float:
        taken = []
        for _ in range(calls):
            call = start()
            began = time.perf_counter()
            call()
            taken.append(time.perf_counter() - began)
            finish()
        return statistics.median(taken) * 1e6

    return measured


def peak_memory(subject: Callable[[], object]) -> float:
    """Return the peak size of the Python objects that a call makes, in kB."""
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        subject()
        return (tracemalloc.get_traced_memory()[1] - before) / 1000
    finally:
        tracemalloc.stop()


def alone(function: F) -> F:
    """Copy a function, so that the interpreter specialises the copy's code separately.

    From Python 3.11 on the interpreter specialises code in place. A process usually serves a
    single application; subjects that share code would undo each other's specialisation.
    """
    assert isinstance(function, FunctionType)
    copy = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    return cast("F", copy)


def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> None:
    """A server's ``start_response`` that does nothing."""


def request(app: App, environ: dict[str, Any] | None = None) -> Callable[[], int]:
    """Return a request with a server's steps: call the application, take chunks, close."""
    template = environ or {"REQUEST_METHOD": "GET"}

    def serve() -> int:
        sent = 0
        body = app(template.copy(), start_response)
        try:
            for chunk in body:
                sent += len(chunk)
        finally:
            close = getattr(body, "close", None)
            if close is not None:
                close()
        return sent

    return alone(serve)


def begin(app: App, **environ: object) -> Callable[[], None]:
    """Make a request as waitress does; return the ``close()`` that ends the request."""
    mark = {"waitress.client_disconnected": None}  # the middleware recognises waitress
    required = {"REQUEST_METHOD": "GET", "SERVER_PROTOCOL": "HTTP/1.1", **mark}
    body: Any = app({**required, **environ}, start_response)
    for _ in body:
        pass
    return cast("Callable[[], None]", body.close)


def row(
    what: str, ours: float, peer: str, theirs: float, goal: str = "", unit: str = ""
) -> None:
    """Print a row of the table; the ratio is this package's figure by the peer's."""
    left, right = f"{ours:.2f}{unit}", f"{peer} {theirs:.2f}{unit}"
    print(f"{what:<44} {left:>9} {right:>34} {ours / theirs:>7.2f}   {goal}", flush=True)


def run(
    title: str, measurements: Mapping[str, Callable[[], None]], unit: str = "microseconds"
) -> None:
    """Take all measurements, or only the measurement named on the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", nargs="?", choices=list(measurements))
    for option, default in vars(options).items():
        parser.add_argument(
            f"--{option}", type=int, default=default, help=f"default: {default}"
        )
    parser.parse_args(namespace=options)
    print(f"\n{title}; CPython {sys.version.split()[0]}, {unit}\n")
    print(f"{'':<44} {'wsgi_bg':>9} {'peer':>34} {'ratio':>7}   to reach")
    for name in [options.name] if options.name else measurements:
        measurements[name]()
