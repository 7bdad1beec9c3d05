"""The pytest plugin: the fixture ``background_tasks``, its marker and its ini option.

pytest loads it by its entry point; ``-p no:wsgi_bg`` turns it off. To annotate the fixture
import :class:`TaskRecorder` from here.

Each run of pytest imports this module, so tests with the fixture import what it needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, get_args

from .exceptions import ExtraMissingError

try:
    import pytest
except ModuleNotFoundError as _exc:
    raise ExtraMissingError("pytest", "wsgi_bg.pytest_plugin") from _exc

from .testing import Mode

if TYPE_CHECKING:
    from .testing.recording import RecordedTask, TaskRecorder
else:

    def __getattr__(name: str) -> object:
        if name not in {"RecordedTask", "TaskRecorder"}:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from .testing import recording

        return getattr(recording, name)


__all__ = ["RecordedTask", "TaskRecorder", "background_tasks"]

_MARKER = "wsgi_bg"
_FIXTURE = "background_tasks"
_INI = "wsgi_bg_mode"
_MODES = get_args(Mode)
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


@pytest.hookimpl(trylast=True)  # after what deselects tests
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker(_MARKER) is not None:
            if not hasattr(item.config, "workerinput"):  # xdist's crash then
                _mode_of(item)  # now, for one error before the first test
            names: list[str] = getattr(item, "fixturenames", [])
            # First, for the requests of other fixtures and of setup_method(). A new list:
            # the parameters of one function share theirs.
            others = [name for name in names if name != _FIXTURE]
            item.fixturenames = [_FIXTURE, *others]  # type: ignore[attr-defined]
        if _FIXTURE in getattr(item, "fixturenames", []):
            # Now, as some tests stop the time or replace parts of the standard library.
            from .testing import recording  # noqa: F401


def _mode_of(item: pytest.Item) -> Mode:
    """The mode that the closest marker says, or the ini option.

    :raises pytest.UsageError: if the marker was given anything but a mode.
    """
    ini: Mode = item.config.getini(_INI)
    marker = item.get_closest_marker(_MARKER)
    if marker is None:
        return ini
    mode: Mode = marker.kwargs.get("mode", ini)
    if marker.args or marker.kwargs.keys() - {"mode"} or mode not in _MODES:
        from .testing.recording import format_call

        given = format_call(_MARKER, marker.args, marker.kwargs)
        raise pytest.UsageError(
            f"{item.nodeid}: write @pytest.mark.{_MARKER}(mode=...) with {_WORDS}; got {given}"
        )
    return mode


@pytest.fixture
def background_tasks(request: pytest.FixtureRequest) -> Iterator[TaskRecorder]:
    """The background tasks that the code under test adds to wsgi_bg.

    Mode "record" runs none: see .tasks, .assert_added(func, *args, **kwargs),
    .assert_none() and .run(). Mode "run" runs them when the response is closed and raises
    their errors in the test. Mode "real" leaves them to the application's runner: see
    .join(timeout). Test clients' responses are closed for you. An error of a task that the
    test does not look at (.errors) fails it in its teardown.
    """
    from .testing.recording import TaskRecorder

    recorder = TaskRecorder(_mode_of(request.node))
    with recorder._watch.active():
        yield recorder
