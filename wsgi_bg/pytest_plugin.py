"""The pytest plugin: the fixture ``background_tasks``, its marker and its ini option.

pytest loads the plugin by its entry point; ``-p no:wsgi_bg`` turns the plugin off. To
annotate the fixture import :class:`TaskRecorder` from here.

Every run of pytest imports this module, so it imports :mod:`wsgi_bg._testing` only for tests
that use the fixture.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from wsgi_bg.exceptions import ExtraMissingError

try:
    import pytest
except ModuleNotFoundError as _exc:
    raise ExtraMissingError("pytest", "wsgi_bg.pytest_plugin") from _exc

if TYPE_CHECKING:
    from wsgi_bg._testing import Mode, RecordedTask, TaskRecorder
else:

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from wsgi_bg import _testing

        return getattr(_testing, name)


__all__ = ["RecordedTask", "TaskRecorder", "background_tasks"]

_MARKER = "wsgi_bg"
_FIXTURE = "background_tasks"
_INI = "wsgi_bg_mode"
_MODES = ("record", "run", "real")
_WORDS = "'record', 'run' or 'real'"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini(_INI, f"mode of the fixture background_tasks: {_WORDS}", default="record")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        f"{_MARKER}(mode): give the test the fixture background_tasks, in mode {_WORDS}",
    )
    mode = config.getini(_INI)
    if mode not in _MODES:
        raise pytest.UsageError(f"the ini option {_INI} must be {_WORDS}; got {mode!r}")


@pytest.hookimpl(trylast=True)  # after hooks that deselect tests
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker(_MARKER) is not None:
            if not hasattr(item.config, "workerinput"):  # a UsageError crashes xdist's workers
                _mode_of(item)  # check now: one error before the first test
            names: list[str] = getattr(item, "fixturenames", [])
            # The fixture comes first of its scope, to see requests of other fixtures and
            # setup_method(), and not those of setup_module(), which only one test would see.
            # A new list, since the variants of a parametrized test share the old list.
            wider = [name for name in names if _outlives(item, name)]
            others = [name for name in names if name not in (*wider, _FIXTURE)]
            item.fixturenames = [*wider, _FIXTURE, *others]  # type: ignore[attr-defined]
        if _FIXTURE in getattr(item, "fixturenames", []):
            # Import now: some tests freeze the time or patch the standard library.
            from wsgi_bg import _testing  # noqa: F401


def _outlives(item: pytest.Item, name: str) -> bool:
    """True if the fixture of that name may serve several tests."""
    known = getattr(getattr(item, "_fixtureinfo", None), "name2fixturedefs", {})
    return any(fixture.scope != "function" for fixture in known.get(name, ())[-1:])


def _mode_of(item: pytest.Item) -> Mode:
    """Return the mode of the closest marker, or else of the ini option.

    :raises pytest.UsageError: if the marker's arguments are not just a valid mode.
    """
    ini: Mode = item.config.getini(_INI)
    marker = item.get_closest_marker(_MARKER)
    if marker is None:
        return ini
    mode: Mode = marker.kwargs.get("mode", ini)
    if marker.args or marker.kwargs.keys() - {"mode"} or mode not in _MODES:
        from wsgi_bg._testing import format_call

        given = format_call(_MARKER, marker.args, marker.kwargs)
        raise pytest.UsageError(
            f"{item.nodeid}: write @pytest.mark.{_MARKER}(mode=...) with {_WORDS}; got {given}"
        )
    return mode


@pytest.fixture
def background_tasks(request: pytest.FixtureRequest) -> Iterator[TaskRecorder]:
    """The background tasks that the code under test adds to wsgi_bg.

    Mode "record" runs no task: see .tasks, .assert_added(func, *args, **kwargs),
    .assert_none() and .run(). Mode "run" runs the tasks when the response is closed and
    raises their errors in the test. Mode "real" submits the tasks to the application's
    runner: see .join(timeout). The fixture closes the responses of test clients. If a task
    raises and the test does not read .errors, the test fails in its teardown.
    """
    from wsgi_bg._testing import recording

    with recording(_mode_of(request.node)) as recorder:
        yield recorder
