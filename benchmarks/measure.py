"""Times several callables in turns, so that what slows the machine down slows all of them."""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])

rounds = 36


def interleave(*subjects: Callable[[], object], calls: int) -> list[float]:
    """The median time of one call of each subject, in microseconds."""
    times: list[list[float]] = [[] for _ in subjects]
    for subject in subjects:
        subject()
    gc.disable()
    try:
        for turn in range(rounds):
            gc.collect()
            for place in range(len(subjects)):
                # Whoever comes first after the collection finds the caches cold.
                number = (turn + place) % len(subjects)
                subject = subjects[number]
                began = time.perf_counter()
                for _ in range(calls):
                    subject()
                times[number].append((time.perf_counter() - began) / calls * 1e6)
    finally:
        gc.enable()
    return [statistics.median(taken) for taken in times]


def alone(function: F) -> F:
    """A copy of a function whose code the interpreter adapts for this copy alone.

    From Python 3.11 on the interpreter specialises each call in place. A process serves one
    application behind one middleware; subjects that share code would spoil it for each other.
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


def row(what: str, ours: str, peer: str, ratio: str, goal: str) -> None:
    """Print one line of the table."""
    print(f"{what:<40} {ours:>8} {peer:>34} {ratio:>18}   {goal}", flush=True)


def run(title: str, measurements: Mapping[str, Callable[[], None]]) -> None:
    """The program: take all measurements, or the one that is named on the command line."""
    global rounds
    parser = argparse.ArgumentParser()
    parser.add_argument("name", nargs="?", choices=list(measurements))
    parser.add_argument("--rounds", type=int, default=rounds, help="default: %(default)s")
    options = parser.parse_args()
    rounds = options.rounds
    print(f"\n{title}; CPython {sys.version.split()[0]}, microseconds\n")
    row("", "wsgi_bg", "peer", "ratio", "to reach")
    for name in [options.name] if options.name else measurements:
        measurements[name]()
