"""The exit of a uWSGI worker; tests/servers starts real ones."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest

from wsgi_bg._process import uwsgi


def fail() -> None:
    raise ValueError("of the drain")


def test_the_applications_own_function_is_called_after_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    module = SimpleNamespace(atexit=lambda: calls.append("the application's"))
    monkeypatch.setitem(sys.modules, "uwsgi", module)
    uwsgi.call_before_exit(lambda: calls.append("ours"))
    module.atexit()
    assert calls == ["ours", "the application's"]


def test_the_applications_own_function_is_called_if_ours_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    module = SimpleNamespace(atexit=lambda: calls.append("the application's"))
    monkeypatch.setitem(sys.modules, "uwsgi", module)
    uwsgi.call_before_exit(fail)
    with pytest.raises(ValueError, match="of the drain"):
        module.atexit()
    assert calls == ["the application's"]


def test_an_application_needs_no_atexit_function(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    module = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "uwsgi", module)
    uwsgi.call_before_exit(lambda: calls.append("ours"))
    module.atexit()
    assert calls == ["ours"]


def test_a_worker_does_not_call_the_functions_of_its_master(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    module = SimpleNamespace(atexit=lambda: calls.append("the application's"))
    monkeypatch.setitem(sys.modules, "uwsgi", module)
    uwsgi.call_before_exit(lambda: calls.append("the master's"))
    monkeypatch.setattr(os, "getpid", lambda: -1)
    uwsgi.call_before_exit(lambda: calls.append("the worker's"))
    module.atexit()
    assert calls == ["the worker's", "the application's"]
