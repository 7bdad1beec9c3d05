"""The plugin in pytest: fixture, marker and ini option, and the reasons why a test fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SHOP = """
import threading

from flask import Flask, request
from wsgi_bg import BackgroundTasksMiddleware, background_tasks, get_background_tasks

app = Flask("shop")
app.wsgi_app = BackgroundTasksMiddleware(app.wsgi_app)
sent = []
client = app.test_client()
gate = threading.Event()

def send(to):
    sent.append(to)

def fail(word):
    raise ValueError(word)

def wait():
    assert gate.wait(10)

@app.get("/send")
def send_view():
    background_tasks.add_task(send, "ada")
    return "ok"

@app.get("/fail/<words>")
def fail_view(words):
    for word in words.split("-"):
        background_tasks.add_task(fail, word)
    return "ok"

@app.get("/rows")
def rows():
    tasks = get_background_tasks(request.environ)
    def stream():
        yield "o"
        tasks.add_task(fail, "late")
        yield "k"
    return stream()
"""


# Only here pytest finds wsgi_bg imported before pytest looks for plugins.
FILTER = """filterwarnings =
    error
    ignore:Module already imported:pytest.PytestAssertRewriteWarning
"""


class Inner:
    """Runs pytest on test modules of a new folder."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self._pytester = pytester
        pytester.makepyfile(shop=SHOP)

    def run(self, source: str, *args: str, ini: str = "") -> pytest.RunResult:
        self._pytester.makepyfile(test_it=f"import pytest, shop\n{source}")
        self._pytester.makeini(f"[pytest]\n{FILTER}{ini}\n")
        return self._pytester.runpytest_inprocess(
            "-p", "no:randomly", "-p", "no:cacheprovider", "--strict-markers", *args
        )


@pytest.fixture
def inner(pytester: pytest.Pytester) -> Inner:
    return Inner(pytester)


def test_the_default_mode_of_the_fixture_is_record(inner: Inner) -> None:
    result = inner.run("""
def test_it(background_tasks):
    assert shop.client.get("/send").text == "ok"
    background_tasks.assert_added(shop.send, "ada")
    assert background_tasks.mode == "record"
    assert shop.sent == []

def test_the_next(background_tasks):
    background_tasks.assert_none()
    assert background_tasks.errors == []
    assert shop.sent == []
""")
    result.assert_outcomes(passed=2)


@pytest.mark.parametrize("mode", ["record", "run", "real"])
def test_the_ini_option_and_the_closest_marker_set_the_mode(inner: Inner, mode: str) -> None:
    result = inner.run(
        f"""
class TestMarked:
    pytestmark = pytest.mark.wsgi_bg(mode="run")

    def test_class(self, background_tasks):
        assert background_tasks.mode == "run"

    @pytest.mark.wsgi_bg(mode="real")
    def test_closest(self, background_tasks):
        assert background_tasks.mode == "real"

    @pytest.mark.wsgi_bg
    def test_bare(self, background_tasks):
        assert background_tasks.mode == "{mode}"

def test_ini(background_tasks):
    assert background_tasks.mode == "{mode}"
""",
        ini=f"wsgi_bg_mode = {mode}",
    )
    result.assert_outcomes(passed=4)


def test_a_marked_test_has_the_fixture_without_asking(inner: Inner) -> None:
    result = inner.run("""
import unittest
pytestmark = pytest.mark.wsgi_bg(mode="run")

@pytest.mark.parametrize("number", [1, 2])
def test_function(number):
    del shop.sent[:]
    shop.client.get("/send")
    assert shop.sent == ["ada"]

class TestCase(unittest.TestCase):
    def test_method(self):
        with self.assertRaisesRegex(ValueError, "boom"):
            shop.client.get("/fail/boom")
""")
    result.assert_outcomes(passed=3)


def test_a_marked_test_does_not_see_the_requests_of_fixtures_of_several_tests(
    inner: Inner,
) -> None:
    result = inner.run(
        """
def setup_module():
    shop.client.get("/send", buffered=True)

@pytest.fixture(scope="session")
def logged_in():
    shop.client.get("/send", buffered=True)

@pytest.mark.wsgi_bg
@pytest.mark.parametrize("number", [1, 2])
def test_it(number, logged_in, background_tasks):
    assert shop.sent == ["ada", "ada"]
    background_tasks.assert_none()
"""
    )
    result.assert_outcomes(passed=2)


def test_a_marker_does_not_keep_items_without_fixtures_from_running(
    inner: Inner, pytester: pytest.Pytester
) -> None:
    pytester.makeconftest("""
import pytest

class Item(pytest.Item):
    def runtest(self):
        pass

def pytest_collection_modifyitems(items):
    items.append(Item.from_parent(items[0].parent, name="item"))
""")
    result = inner.run("""
pytestmark = pytest.mark.wsgi_bg(mode="run")

def test_it(): pass
""")
    result.assert_outcomes(passed=2)


@pytest.mark.parametrize(
    "marker",
    [
        'wsgi_bg(mode="fast")',
        'wsgi_bg("run")',
        'wsgi_bg(mode="run", timeout=1)',
        "wsgi_bg(mode=[])",
    ],
)
def test_a_wrong_marker_is_a_single_error_that_names_the_test(
    inner: Inner, marker: str
) -> None:
    result = inner.run(f"""
def test_first(): pass

@pytest.mark.{marker}
def test_it(): pass
""")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        "ERROR: test_it.py::test_it: write @pytest.mark.wsgi_bg(mode=[.][.][.]) with 'record', "
        f"'run' or 'real'; got {marker.replace('[', '[[]').replace(chr(34), chr(39))}"
    )
    assert inner.run(
        f"""
def test_first(): pass

@pytest.mark.{marker}
def test_it(): pass
""",
        "-k",
        "first",
    ).parseoutcomes() == {"passed": 1, "deselected": 1}


def test_in_a_worker_of_xdist_a_wrong_marker_is_an_error_of_its_test(
    inner: Inner, pytester: pytest.Pytester
) -> None:
    pytester.makeconftest("def pytest_configure(config): config.workerinput = {}")
    result = inner.run("""
def test_first(): pass

@pytest.mark.wsgi_bg("run")
def test_it(): pass
""")
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(
        "E *UsageError: test_it.py::test_it: write *; got wsgi_bg('run')"
    )


def test_a_wrong_ini_option_is_a_single_error(inner: Inner) -> None:
    result = inner.run("def test_it(): pass", ini="wsgi_bg_mode = fast")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        "ERROR: the ini option wsgi_bg_mode must be 'record', 'run' or 'real'; got 'fast'"
    )


def test_an_unseen_error_fails_the_test_in_its_teardown(inner: Inner) -> None:
    result = inner.run("""
@pytest.mark.wsgi_bg(mode="run")
def test_stream(background_tasks):
    shop.client.get("/rows")  # the first chunk of it
    shop.client.get("/send")
    tasks = background_tasks.tasks
    with pytest.raises(ValueError):
        shop.client.get("/fail/first-second")

@pytest.mark.wsgi_bg(mode="real")
def test_real(background_tasks):
    shop.client.get("/fail/one-two")

def test_looked_at(background_tasks):
    shop.client.get("/fail/seen-read")
    with pytest.raises(ValueError, match="seen"):
        background_tasks.run()
    assert len(background_tasks.errors) == 2
""")
    result.assert_outcomes(passed=3, errors=2)
    result.stdout.fnmatch_lines(
        [
            "*ERROR at teardown of test_stream*",
            "E *ValueError: second",
            "*ERROR at teardown of test_real*",
            "E *ValueError: one",
            "E *background task raised this, and the test did not look*",
            "*Captured log call*",
            "ValueError: two",
        ]
    )


def test_an_error_that_the_test_does_not_catch_fails_the_test_and_not_its_teardown(
    inner: Inner,
) -> None:
    result = inner.run("""
@pytest.mark.wsgi_bg(mode="run")
def test_run():
    shop.client.get("/fail/boom")

def test_record(background_tasks):
    shop.client.get("/fail/boom")
    background_tasks.run()
""")
    result.assert_outcomes(failed=2)


def test_an_unread_stream_is_closed_and_its_error_fails_the_teardown(inner: Inner) -> None:
    result = inner.run("""
@pytest.mark.wsgi_bg(mode="run")
def test_it():
    app = shop.BackgroundTasksMiddleware(unread)
    response = shop.app.test_client()
    from werkzeug.test import Client
    response = Client(app).get("/")

def unread(environ, start_response):
    shop.background_tasks.add_task(shop.fail, "unread")
    start_response("200 OK", [])
    return iter([b"o", b"k"])
""")
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines("ERROR test_it.py::test_it - ValueError: unread")


def test_the_end_of_a_test_waits_for_its_tasks_and_names_unfinished_tasks(
    inner: Inner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsgi_bg._testing.TEARDOWN_TIMEOUT", 0.05)
    result = inner.run("""
shop.app.wsgi_app = shop.BackgroundTasksMiddleware(shop.app.wsgi_app, runner="pool")

@shop.app.get("/wait")
def view():
    shop.background_tasks.add_task(shop.fail, "boom")
    shop.background_tasks.add_task(shop.wait)
    return "ok"

@pytest.mark.wsgi_bg(mode="real")
def test_stuck():
    shop.client.get("/wait")

@pytest.mark.wsgi_bg(mode="real")
def test_joined(background_tasks):
    shop.gate.set()
    shop.client.get("/wait")
    with pytest.raises(ValueError, match="boom"):
        background_tasks.join(10)
""")
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(
        [
            "*TimeoutError: not finished after 0.05 s: shop.wait",
            "*During handling of the above exception*",
            "ERROR test_it.py::test_stuck - ValueError: boom",
        ]
    )


def test_a_failed_assertion_is_shown_at_the_line_of_the_test(inner: Inner) -> None:
    result = inner.run("""
def test_it(background_tasks):
    shop.client.get("/send")
    background_tasks.assert_added(shop.send, "grace")
""")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            '>*background_tasks.assert_added(shop.send, "grace")',
            "E*AssertionError: shop.send('grace') was not added; added were:",
            "E*  shop.send('ada') by /send",
            "test_it.py:*: AssertionError",
        ]
    )
    assert "_testing.py" not in result.stdout.str()


def test_a_proxy_that_the_test_module_imports_does_not_hide_the_fixture(inner: Inner) -> None:
    result = inner.run("""
from wsgi_bg import background_tasks

def test_it(background_tasks):
    shop.client.get("/send")
    background_tasks.assert_added(shop.send, "ada")
""")
    result.assert_outcomes(passed=1)


def test_a_fixture_of_that_name_in_a_conftest_is_used_instead(
    inner: Inner, pytester: pytest.Pytester
) -> None:
    pytester.makeconftest("""
import pytest

@pytest.fixture
def background_tasks(background_tasks):
    return [background_tasks]
""")
    result = inner.run("""
def test_it(background_tasks):
    shop.client.get("/send")
    background_tasks[0].assert_added(shop.send, "ada")
""")
    result.assert_outcomes(passed=1)


def test_without_the_fixture_tasks_run_as_ever(inner: Inner) -> None:
    result = inner.run("""
def test_with(background_tasks):
    shop.client.get("/send")

def test_without():
    shop.client.get("/send", buffered=True)
    assert shop.sent == ["ada"]
""")
    result.assert_outcomes(passed=2)


def test_the_help_of_pytest_lists_the_fixture_the_marker_and_the_option(inner: Inner) -> None:
    result = inner.run("", "--fixtures")
    result.stdout.fnmatch_lines("background_tasks -- *pytest_plugin.py:*")
    result = inner.run("", "--markers")
    result.stdout.fnmatch_lines("@pytest.mark.wsgi_bg(mode): *")
    result = inner.run("", "--help")
    result.stdout.fnmatch_lines("*wsgi_bg_mode (string):*")


def run_pytest(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:randomly", *args],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_installed_plugin_is_loaded_and_can_be_turned_off(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_it(background_tasks): pass\n")
    assert "1 passed" in run_pytest(tmp_path, "-W", "error").stdout
    off = run_pytest(tmp_path, "-p", "no:wsgi_bg").stdout
    assert "fixture 'background_tasks' not found" in off


CLEAR = """
@pytest.fixture(autouse=True)
def _clear():
    shop.sent.clear()
"""


def test_a_marked_parameter_changes_no_further_parameter(inner: Inner) -> None:
    result = inner.run(
        CLEAR
        + """
record = pytest.mark.wsgi_bg(mode="record")

@pytest.mark.parametrize("marked", [pytest.param(True, marks=record), False])
def test_it(marked):
    shop.client.get("/send", buffered=True)
    assert shop.sent == ([] if marked else ["ada"])
"""
    )
    result.assert_outcomes(passed=2)


def test_a_marked_test_has_the_fixture_before_further_fixtures_and_setup_method(
    inner: Inner,
) -> None:
    result = inner.run(
        CLEAR
        + """
@pytest.fixture
def logged_in():
    shop.client.get("/send")

@pytest.mark.wsgi_bg(mode="run")
def test_it(logged_in):
    assert shop.sent == ["ada"]

@pytest.mark.wsgi_bg(mode="record")
class TestIt:
    def setup_method(self):
        shop.client.get("/send")

    def test_it(self, background_tasks):
        assert [task.args for task in background_tasks.tasks] == [("ada",)]
        assert shop.sent == []
"""
    )
    result.assert_outcomes(passed=2)
