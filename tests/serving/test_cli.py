"""The command ``wsgi-bg``: what it serves and what it refuses."""

from __future__ import annotations

import configparser
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE

import pytest

import wsgi_bg
from tests.support import TIMEOUT
from tests.support.command import MODULE, SHOP, running, serving, write
from wsgi_bg._serving.cli import main
from wsgi_bg._serving.serve import announce

ROOT = Path(__file__).parents[2]

each_way = pytest.mark.parametrize("way", ["script", "module"])


def command_of(way: str, folder: Path) -> list[str]:
    """The command ``python -m wsgi_bg``, or the script as pip makes it, in ``folder``."""
    if way == "module":
        return list(MODULE)
    setup = configparser.RawConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    name, _, target = setup["options.entry_points"]["console_scripts"].strip().partition(" = ")
    module, _, function = target.partition(":")
    file = folder / "bin" / name
    file.parent.mkdir()
    file.write_text(f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n")
    return [sys.executable, str(file)]


def refused(
    *arguments: str, folder: Path, way: str = "module"
) -> subprocess.CompletedProcess[str]:
    """Run the command with arguments that the command refuses."""
    return subprocess.run(
        [*command_of(way, folder), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=2 * TIMEOUT,
        check=False,
    )


# Serving.


@pytest.mark.parametrize("path", ["/plain", "/coroutine"])
def test_a_response_comes_while_its_task_waits(path: str, tmp_path: Path) -> None:
    with serving(tmp_path, "--threads", "1") as command:
        assert command.ask(path).read() == b"ok\n"
        assert command.line() == "task begins"
        assert command.ask("/answer").read() == b"ok\n"
        command.open_gate()
        assert command.line() == "task ends"
        assert command.line() == "task of the task ran"


@each_way
def test_the_current_directory_comes_first_on_the_import_path(way: str, tmp_path: Path) -> None:
    arguments = [*command_of(way, tmp_path), "shop:app", "--port", "0"]
    write(tmp_path, "shop", SHOP + "import sys\nsay(os.path.samefile(sys.path[0], '.'))\n")
    with running(arguments, tmp_path) as command:
        assert command.said_first == ["True"]
        assert command.ask("/answer").read() == b"ok\n"
        command.send(signal.SIGTERM)
        assert command.end() == (0, [])


def test_the_application_may_be_an_attribute_of_an_object(tmp_path: Path) -> None:
    write(tmp_path, "outer", "import shop\n")
    with serving(tmp_path, app="outer:shop.app") as command:
        assert command.ask("/answer").read() == b"ok\n"


def test_waitresss_option_call_makes_the_application_with_a_factory(tmp_path: Path) -> None:
    write(tmp_path, "outer", "import shop\ndef make(): return shop.app\n")
    with serving(tmp_path, "--", "--call", app="outer:make") as command:
        assert command.ask("/answer").read() == b"ok\n"


def test_options_behind_the_dashes_are_given_to_waitress(tmp_path: Path) -> None:
    with serving(tmp_path, "--", "--ident=shop/1") as command:
        assert command.ask("/answer").headers["Server"] == "shop/1"


def test_addresses_may_be_given_to_waitress(tmp_path: Path) -> None:
    both = ["--listen=127.0.0.1:0", "--listen=127.0.0.1:0"]
    with serving(tmp_path, "--", *both) as command:
        first, second = command.address, command.line().removeprefix("Serving on ")
        assert first != second
        for address in (first, second):
            command.port = int(address.rpartition(":")[2])
            assert command.ask("/plain").read() == b"ok\n"
            assert command.line() == "task begins"
        command.stop_accepting()
        command.open_gate()
        command.open_gate()
        said = sorted(command.line() for _ in range(4))
        assert said == 2 * ["task ends"] + 2 * ["task of the task ran"]
        assert command.end() == (0, [])


def test_the_command_serves_on_a_unix_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "shop", SHOP)
    with running([*MODULE, "shop:app", "--", "--unix-socket=here"], tmp_path) as command:
        assert command.address == "unix:here"
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(TIMEOUT)
            monkeypatch.chdir(tmp_path)  # the path of a socket has to be short
            client.connect("here")
            client.sendall(b"GET /answer HTTP/1.0\r\n\r\n")
            with client.makefile("rb") as received:
                assert received.read().endswith(b"\r\n\r\nok\n")
        command.send(signal.SIGTERM)
        assert command.end() == (0, [])


THREADS = """
import threading

barrier = threading.Barrier(3)

def app(environ, start_response):
    barrier.wait(10)
    start_response("200 OK", [("Content-Length", "3")])
    return [b"ok\\n"]
"""


def test_as_many_requests_as_threads_are_handled_at_the_same_time(tmp_path: Path) -> None:
    write(tmp_path, "outer", THREADS)
    with serving(tmp_path, "--threads", "3", app="outer:app") as command:
        connections = [command.request("/") for _ in range(3)]
        assert [each.getresponse().read() for each in connections] == 3 * [b"ok\n"]


@pytest.mark.parametrize(
    ("options", "name"),
    [((), "PoolRunner"), (("--runner", "pool"), "PoolRunner"), (("--runner", "inline"), "Inl")],
)
def test_middleware_without_a_runner_gets_that_of_the_command(
    options: tuple[str, ...], name: str, tmp_path: Path
) -> None:
    source = SHOP + "import wsgi_bg\napp = wsgi_bg.BackgroundTasksMiddleware(app)\nsay(app)\n"
    write(tmp_path, "outer", source)
    with serving(tmp_path, *options, app="outer:app") as command:
        assert name in command.said_first[0]
        assert command.ask("/quick").read() == b"ok\n"
        assert command.line() == "task ran"
        command.send(signal.SIGTERM)
        assert command.end() == (0, [])  # no further output: the task has run once


OWN_RUNNER = """
import wsgi_bg

class Own(wsgi_bg.PoolRunner):
    def check(self, task):
        say("the application's own runner looks at it")

    def submit(self, batch):
        say("and takes it")
        super().submit(batch)

app = wsgi_bg.BackgroundTasksMiddleware(
    wsgi_bg.BackgroundTasksMiddleware(app, runner=wsgi_bg.InlineRunner()), runner=Own()
)
"""


def test_the_applications_runner_holds_unless_the_command_has_an_option(
    tmp_path: Path,
) -> None:
    write(tmp_path, "outer", SHOP + OWN_RUNNER)
    with serving(tmp_path, app="outer:app") as command:
        assert command.ask("/quick").read() == b"ok\n"
        assert [command.line() for _ in range(3)] == [
            "the application's own runner looks at it",
            "and takes it",
            "task ran",
        ]
        command.send(signal.SIGTERM)
        assert command.end() == (0, [])
    with serving(tmp_path, "--runner", "pool", app="outer:app") as command:
        assert command.ask("/quick").read() == b"ok\n"
        assert command.line() == "task ran"


def test_an_inline_runner_runs_the_task_on_the_threads_of_waitress(tmp_path: Path) -> None:
    write(
        tmp_path,
        "outer",
        SHOP + "import threading\n"
        "task = lambda: say(threading.current_thread().name.partition('-')[0])\n"
        "slow = task\n",
    )
    for runner, prefix in ("inline", "waitress"), ("pool", "wsgi_bg"):
        options = ("--runner", runner)
        with serving(tmp_path, *options, app="outer:app") as command:
            assert command.ask("/plain").read() == b"ok\n"
            assert command.line() == prefix


def test_the_readmes_command_serves_the_example(tmp_path: Path) -> None:
    """The example has middleware too; the task runs once all the same."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    with running([*MODULE, "examples.flask_app:app", "--port", "0"], tmp_path) as command:
        connection = command.connect()
        connection.request("POST", "/send-notification/ada@example.com")
        answer = connection.getresponse().read()
        assert answer == b'{"message":"Notification sent in the background"}\n'
        log = tmp_path / "log.txt"
        assert not log.exists()
        command.send(signal.SIGINT)
        waited_for = "1 background task (1 examples.flask_app.send_mail)"
        assert command.next_error() == (
            f"WARNING:wsgi_bg:the process ends, and waits for {waited_for}: for 29 s more "
            "at most; a second signal ends the wait"
        )
        assert command.end() == (0, [])
        assert log.read_text() == "To ada@example.com: You have news\n"


SOCKETS = """

def answer(environ, start_response):
    import stat, sys
    is_device = sys.stdout is not None or stat.S_ISCHR(os.fstat(1).st_mode)
    start_response("200 OK", [("Content-Length", "3")])
    return [b"ok\\n" if is_device else b"no\\n"]
"""


@pytest.mark.parametrize("where", ["closed", "full", "broken", "all closed"])
def test_the_command_serves_without_a_standard_output(where: str, tmp_path: Path) -> None:
    """No socket or pipe may get descriptor 1: output of libraries would go there."""
    write(tmp_path, "shop", SHOP + SOCKETS)
    path = tmp_path / "socket"
    options = shlex.join([*MODULE, "shop:app", "--", f"--unix-socket={path}"])
    redirect = {
        "closed": f"exec {options} >&-",
        "full": f"exec {options} >/dev/full",
        "broken": f"exec {options} | true",
        "all closed": f"exec {options} <&- >&- 2>&-",
    }[where]
    shell = ["bash", "-c", f"{redirect}; exit ${{PIPESTATUS[0]}}"]
    process = subprocess.Popen(shell, cwd=tmp_path, start_new_session=True, stderr=PIPE)
    try:
        assert ask_unix(path).endswith(b"\r\n\r\nok\n")
        os.killpg(process.pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=TIMEOUT)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    if where == "broken":  # bash ends by the signal too
        assert process.returncode in (0, -signal.SIGTERM)
    else:
        assert (process.returncode, errors) == (0, b"")


def ask_unix(path: Path) -> bytes:
    """Return the response of a server that begins to listen at ``path`` some time later."""
    pause = threading.Event()
    for _ in range(int(TIMEOUT / 0.05)):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(TIMEOUT)
            try:
                client.connect(str(path))
            except OSError:
                pause.wait(0.05)
                continue
            client.sendall(b"GET /answer HTTP/1.0\r\n\r\n")
            with client.makefile("rb") as received:
                return received.read()
    raise AssertionError("it does not listen")


def test_the_address_goes_to_the_replacement_of_standard_output(
    capsys: pytest.CaptureFixture[str],
) -> None:
    announce("here\n")
    assert capsys.readouterr().out == "here\n"


# Refused arguments: an error of a single line, status 2.

REFUSED = {
    "": "the following arguments are required: MODULE:APP (see wsgi-bg --help)",
    "shop": "'shop' is not MODULE:APP, for instance shop.wsgi:app",
    ":app": "':app' is not MODULE:APP, for instance shop.wsgi:app",
    "shop:": "'shop:' is not MODULE:APP, for instance shop.wsgi:app",
    "shop.py:app": (
        "No module named 'shop.py'; 'shop' is not a package (looked for in {} first)"
    ),
    "./shop:app": "'./shop:app' is not MODULE:APP, for instance shop.wsgi:app",
    "nowhere:app": "No module named 'nowhere' (looked for in {} first)",
    "nowhere.shop:app": "No module named 'nowhere' (looked for in {} first)",
    "shop:make()": "for an application factory write shop:make -- --call",
    "shop:app.make() -- --call": "for an application factory write shop:app.make -- --call",
    "shop:make(1)": "'shop:make(1)' is not MODULE:APP, for instance shop.wsgi:app",
    "shop:nothing": "module 'shop' has no attribute 'nothing'",
    "shop:app.nothing": "module 'shop' has no attribute 'app.nothing'",
    "shop:__name__": "shop:__name__ is not callable: it is a str",
    "shop:__name__ -- --call": "shop:__name__ is not callable: it is a str",
    "shop:wait -- --call": "shop:wait() is not callable: it is a NoneType",
    "shop:slow_async": (
        "shop:slow_async is async, as ASGI applications are: give a WSGI application"
    ),
    "shop:slow_async -- --call": (
        "shop:slow_async is async, as ASGI applications are: give a WSGI application"
    ),
    "shop:app --nothing": "unrecognized arguments: --nothing (see wsgi-bg --help)",
    "shop:app --por 1": "unrecognized arguments: --por 1 (see wsgi-bg --help)",
    "shop:app --port x": "argument --port: invalid int value: 'x' (see wsgi-bg --help)",
    "shop:app --port 65536": "port must be 0 to 65535, or None; got 65536",
    "shop:app --threads 0": "threads must be 1 or more; got 0",
    "shop:app --drain-timeout -1": (
        "drain_timeout must be 0 seconds or more, or None; got -1.0"
    ),
    "shop:app --host nowhere.invalid": (
        "cannot listen on nowhere.invalid:8080: Invalid host/port specified."
    ),
    "shop:app --host 192.0.2.1 --port 1": (
        "cannot listen on 192.0.2.1:1: Cannot assign requested address"
    ),
    "shop:app -- --nothing": "option --nothing not recognized (see waitress-serve --help)",
    "shop:app -- --port=1": "--port does not belong behind --",
    "shop:app -- other:app": "other:app does not belong behind --",
    "shop:app -- --backlog=x": (
        "cannot listen on 127.0.0.1:8080: invalid literal for int() with base 10: 'x' "
        "(with --backlog=x)"
    ),
    "shop:app --port 1 -- --listen=127.0.0.1:0": (
        "cannot listen on 127.0.0.1:0: host or port may not be set if listen is set. "
        "(with --listen=127.0.0.1:0)"
    ),
    "shop:app -- --listen=": (
        "cannot listen on 127.0.0.1:8080: host or port may not be set if listen is set. "
        "(with --listen=)"
    ),
    "shop:app -- --unix-socket=no/socket": (
        "cannot listen on no/socket: No such file or directory (with --unix-socket=no/socket)"
    ),
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_a_mistake_of_the_user_is_a_single_line_and_status_2(
    arguments: str, tmp_path: Path
) -> None:
    write(tmp_path, "shop", SHOP)
    done = refused(*arguments.split(), folder=tmp_path)
    message = REFUSED[arguments].format(tmp_path.resolve())
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"wsgi-bg: {message}\n")


@each_way
def test_a_port_in_use_is_a_single_line_and_status_2(way: str, tmp_path: Path) -> None:
    write(tmp_path, "shop", SHOP)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = refused("shop:app", "--port", port, folder=tmp_path, way=way)
    message = f"wsgi-bg: cannot listen on 127.0.0.1:{port}: Address already in use\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


def test_without_waitress_the_error_names_the_package_to_install(tmp_path: Path) -> None:
    write(tmp_path, "waitress_is_missing", "import sys\nsys.modules['waitress'] = None\n")
    write(tmp_path, "run", "import waitress_is_missing, wsgi_bg.__main__\n")
    done = subprocess.run(
        [sys.executable, "run.py", "shop:app"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert (done.returncode, done.stderr) == (
        2,
        "wsgi-bg: serving an application needs a package that is not installed: "
        "pip install 'wsgi_bg[waitress]'\n",
    )


def test_version_names_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"wsgi-bg {wsgi_bg.__version__}\n"


def test_help_names_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "wsgi-bg [OPTIONS] MODULE:APP [-- OPTIONS OF WAITRESS]" in text
    for option in ("--host", "--port", "--threads", "--runner", "--drain-timeout", "--version"):
        assert option in text


# An error inside the user's module.


@pytest.mark.parametrize(
    ("source", "last"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import nowhere", "ModuleNotFoundError: No module named 'nowhere'"),
        ("import sho", "ModuleNotFoundError: No module named 'sho'"),
        ("import shop_settings.prod", "ModuleNotFoundError: No module named 'shop_settings'"),
        ("from os import nowhere", "ImportError: cannot import name 'nowhere' from 'os'"),
        ("raise ModuleNotFoundError('no licence')", "ModuleNotFoundError: no licence"),
        (
            "import wsgi_bg; wsgi_bg.BackgroundTasksMiddleware(print, runner='poll')",
            "wsgi_bg.exceptions.OptionValueError: runner must be 'inline', 'pool' or a runner "
            "object; got 'poll'",
        ),
        ("app = property(1)\ndef __getattr__(name): raise OSError('no disk')", "no disk"),
        ("def app(): raise OSError('no disk')", "OSError: no disk"),
    ],
)
def test_an_error_inside_the_users_module_keeps_its_traceback(
    source: str, last: str, tmp_path: Path
) -> None:
    name = "nothing" if "__getattr__" in source else "app"
    write(tmp_path, "shop", source + "\n")
    done = refused(f"shop:{name}", "--", "--call", folder=tmp_path)
    assert done.returncode == 1
    assert "Traceback (most recent call last):\n" in done.stderr
    assert f'File "{tmp_path.resolve()}/shop.py", line ' in done.stderr
    assert last in done.stderr.splitlines()[-1]
