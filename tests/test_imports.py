"""Imports: which modules are loaded, by whom, and when."""

from __future__ import annotations

import copy
import importlib
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

import wsgi_bg
from tests.support import run_python
from tests.support.marks import needs_threads_at_exit
from wsgi_bg import exceptions, pytest_plugin
from wsgi_bg.exceptions import OutsideRequestError

# tests.support imports asyncio.
REQUEST = """
import os, sys, threading
import wsgi_bg

def plain(): os.write(1, b"ran\\n")
async def async_(): os.write(1, b"ran\\n")

def request(function, runner=None):
    def app(environ, start_response):
        wsgi_bg.background_tasks.add_task(function)
        start_response("200 OK", [])
        return [b""]

    app = wsgi_bg.BackgroundTasksMiddleware(app, runner=runner)
    body = app({"REQUEST_METHOD": "GET"}, lambda *args: None)
    list(body)
    body.close()
"""


def test_import_wsgi_bg_loads_none_of_its_dependencies() -> None:
    done = run_python(
        """
        import sys
        import concurrent.futures.thread  # loads inspect and dataclasses on Python 3.14
        before = set(sys.modules)
        import wsgi_bg
        loaded = sys.modules.keys() - before
        names = {"anyio", "asyncio", "celery", "dataclasses", "flask", "inspect", "json",
                 "pytest", "waitress", "werkzeug"}
        print(names & loaded, [name for name in loaded if name.startswith("wsgi_bg.")])
        """
    )
    assert done.stdout == "set() ['wsgi_bg._version']\n", done.stderr


def test_all_names_load_werkzeug_and_neither_asyncio_nor_an_integration() -> None:
    done = run_python(
        """
        import sys, werkzeug.local
        before = set(sys.modules)
        import wsgi_bg
        for name in wsgi_bg.__all__:
            if name != "DurableRunner":  # needs sqlite3 and the codec
                getattr(wsgi_bg, name)
        loaded = set(sys.modules) - before
        packages = {name.partition(".")[0] for name in loaded}
        print(packages - sys.stdlib_module_names, "asyncio" in loaded)
        integrations = {"_serving.cli", "_serving.server", "_testing", "celery"}
        integrations.add("_messages.codec")
        print({f"wsgi_bg.{name}" for name in integrations} & loaded)
        """
    )
    assert done.stdout == "{'wsgi_bg'} False\nset()\n", done.stderr


def test_plain_tasks_load_no_asyncio() -> None:
    done = run_python(
        f"""{REQUEST}
request(plain)
request(plain, "pool")
print(wsgi_bg.drain(10), {{"anyio", "asyncio"}} & sys.modules.keys())
"""
    )
    assert done.stdout == "ran\nran\n[] set()\n", done.stderr


@needs_threads_at_exit
def test_the_portals_thread_imports_asyncio_for_no_signal_handler_interrupts_it() -> None:
    """An exception of a signal handler would leave asyncio half imported for good."""
    done = run_python(
        f"""{REQUEST}
class Watch:
    @staticmethod
    def find_spec(name, path, target=None):
        if name in ("asyncio", "anyio", "anyio.from_thread"):
            print(name, threading.current_thread().name)

sys.meta_path.insert(0, Watch)
request(async_)
"""
    )
    assert sorted(done.stdout.split("\n")) == [
        "",
        "anyio wsgi_bg-portal",
        "anyio.from_thread wsgi_bg-portal",
        "asyncio wsgi_bg-portal",
        "ran",
    ], done.stderr


@needs_threads_at_exit
@pytest.mark.parametrize("function", ["plain", "async_"])
def test_a_name_may_be_used_first_when_the_main_thread_has_ended(function: str) -> None:
    done = run_python(
        f"""{REQUEST}
def serve():
    threading.main_thread().join()
    request({function})

threading.Thread(target=serve).start()
"""
    )
    assert (done.stdout, done.stderr) == ("ran\n", "")


def test_drain_may_be_used_first_at_the_exit() -> None:
    done = run_python(
        """
        import atexit, threading
        import wsgi_bg
        atexit.register(lambda: print(wsgi_bg.drain()))
        """
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_each_public_name_is_found_by_import_dir_and_all() -> None:
    assert {*wsgi_bg._HOMES, "__version__"} == set(wsgi_bg.__all__) <= set(dir(wsgi_bg))
    names: dict[str, object] = {}
    exec("from wsgi_bg import *", names)  # import * is allowed only at module level
    assert all(names[name] is getattr(wsgi_bg, name) for name in wsgi_bg.__all__)
    with pytest.raises(
        AttributeError, match="module 'wsgi_bg' has no attribute 'BackgroundTaks'"
    ):
        getattr(wsgi_bg, "BackgroundTaks")  # noqa: B009


@pytest.mark.parametrize("module", ["celery", "rq", "dramatiq"])
def test_a_module_with_a_runner_lists_all_its_names_before_their_first_use(module: str) -> None:
    code = f"""
        import wsgi_bg.{module} as module
        print(set(module.__all__) <= set(dir(module)), "{module}" in __import__("sys").modules)
    """
    assert run_python(code).stdout == "True False\n"


@pytest.mark.parametrize("name", ["wait", "runners"])
def test_a_single_thread_at_a_time_imports_names(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Two threads would import a package and its modules in two orders: _DeadlockError."""
    may_import: list[bool] = []

    def import_module(*args: str) -> Any:
        other = threading.Thread(target=lambda: may_import.append(lock.acquire(blocking=False)))
        other.start()
        other.join(10)
        return importlib.import_module(*args)

    lock: Any = wsgi_bg._lock
    monkeypatch.delitem(vars(wsgi_bg), name, raising=False)
    monkeypatch.setattr(wsgi_bg, "_import_module", import_module)
    getattr(wsgi_bg, name)
    assert may_import == [False]


def test_modules_that_0_2_had_loaded_need_no_import_of_their_own() -> None:
    done = run_python(
        """
        import wsgi_bg
        print(wsgi_bg.exceptions.WsgiBgError.__name__, wsgi_bg.hooks.Hooks.__name__,
              wsgi_bg.runners.Statistics.__name__, wsgi_bg.shutdown.leave.__name__)
        """
    )
    assert done.stdout == "WsgiBgError Hooks Statistics leave\n", done.stderr


def test_status_needs_no_import_of_its_own() -> None:
    done = run_python(
        """
        import wsgi_bg
        print(wsgi_bg.status.snapshot().running, "status" in dir(wsgi_bg))
        """
    )
    assert done.stdout == "() True\n", done.stderr


def test_a_pickled_error_and_function_need_no_import_of_the_package() -> None:
    pickled = pickle.dumps((OutsideRequestError("outside"), wsgi_bg.drain))
    done = run_python(
        f"""
        import pickle
        error, function = pickle.loads({pickled!r})
        print(repr(error), function.__qualname__)
        """
    )
    assert done.stdout == "OutsideRequestError('outside') drain\n", done.stderr


ERRORS = [
    exceptions.TaskTypeError("message", "given"),
    exceptions.BatchEndedError("shop.mail"),
    exceptions.EndlessTasksError("shop.mail", 101, is_first=True),
    exceptions.OptionValueError("delay", -1, "0 seconds or more"),
    exceptions.ExtraMissingError("flask", "wsgi_bg.flask"),  # an ImportError
    exceptions.PlainCallError("shop.mail"),
    exceptions.PublishError("shop.mail", "the broker is away"),  # an OSError
]


@pytest.mark.parametrize("again", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_copied_or_pickled_error_keeps_its_message_and_attributes(
    error: exceptions.WsgiBgError, again: Callable[[Any], Any]
) -> None:
    error.add_note("a note")
    found = again(error)
    assert type(found) is type(error)
    assert (str(found), found.args, vars(found)) == (str(error), error.args, vars(error))
    assert getattr(found, "msg", None) == getattr(error, "msg", None)


# pytest


def test_a_run_of_pytest_without_the_fixture_loads_the_plugin_only(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile(
        """
        import sys
        def test():
            loaded = {name for name in sys.modules if name.startswith("wsgi_bg")}
            assert loaded == {"wsgi_bg", "wsgi_bg.exceptions", "wsgi_bg._process.interrupts",
                              "wsgi_bg._process", "wsgi_bg._version",
                              "wsgi_bg.pytest_plugin"}
            assert "werkzeug" not in sys.modules
        """
    )
    _assert_passes(pytester)


def test_what_the_fixture_needs_is_loaded_before_the_first_test(
    pytester: pytest.Pytester,
) -> None:
    """Some tests stop the time, or replace parts of the standard library."""
    pytester.makepyfile(
        """
        import sys
        at_import = "wsgi_bg._testing" in sys.modules
        def test_first():
            assert (at_import, "wsgi_bg._testing" in sys.modules) == (False, True)
        def test_second(background_tasks): pass
        """
    )
    _assert_passes(pytester)


def _assert_passes(pytester: pytest.Pytester) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:randomly"]
    done = subprocess.run(
        command, cwd=pytester.path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout


def test_the_plugin_exports_only_the_names_for_annotations() -> None:
    from wsgi_bg import _testing

    assert pytest_plugin.TaskRecorder is _testing.TaskRecorder
    assert pytest_plugin.RecordedTask is _testing.RecordedTask
    with pytest.raises(AttributeError, match="has no attribute 'Recorder'"):
        getattr(pytest_plugin, "Recorder")  # noqa: B009
