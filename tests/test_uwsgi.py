"""The exit of a uWSGI worker; tests/servers starts real ones."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from wsgi_bg import uwsgi


def fail() -> None:
    raise ValueError("of the drain")


def test_the_applications_own_function_is_called_after_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    module = SimpleNamespace(atexit=lambda: calls.append("the application's"))
    monkeypatch.setitem(sys.modules, "uwsgi", module)
    uwsgi.call_at_exit(lambda: calls.append("ours"))
    module.atexit()
    assert calls == ["ours", "the application's"]


def test_the_applications_own_function_is_called_if_ours_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    module = SimpleNamespace(atexit=lambda: calls.append("the application's"))
    monkeypatch.setitem(sys.modules, "uwsgi", module)
    uwsgi.call_at_exit(fail)
    with pytest.raises(ValueError, match="of the drain"):
        module.atexit()
    assert calls == ["the application's"]


def test_an_application_needs_no_function_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    module = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "uwsgi", module)
    uwsgi.call_at_exit(lambda: calls.append("ours"))
    module.atexit()
    assert calls == ["ours"]
