"""The stop of ``wsgi-bg``: real processes, real signals, real connections."""

from __future__ import annotations

import itertools
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import wsgi_bg
import wsgi_bg._serving.serve as wsgi_bg_serving
from tests.support import TIMEOUT, App, app_that
from tests.support.command import MODULE, SHOP, running, serving, write
from wsgi_bg._serving import server as graceful
from wsgi_bg._serving.server import GracefulServer
from wsgi_bg._serving.signals import StopSignals
from wsgi_bg.exceptions import ExtraMissingError, MainThreadError
from wsgi_bg.runners.waiting import Notice

each_signal = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])


def not_finished(name: str, reason: str) -> str:
    return (
        f"ERROR:wsgi_bg:background task {name} was not finished {reason}: the process ends "
        "without it"
    )


@each_signal
@pytest.mark.parametrize("options", [(), ("--asyncore-use-poll",)], ids=["select", "poll"])
def test_a_server_with_nothing_to_do_hears_the_signal(
    options: tuple[str, ...], number: signal.Signals, tmp_path: Path
) -> None:
    # waitress's loop would look up once an hour.
    with serving(tmp_path, "--", "--asyncore-loop-timeout=3600", *options) as command:
        command.send(number)
        assert command.end() == (0, [])


@each_signal
def test_a_signal_is_heard_that_does_not_interrupt_the_wait_for_connections(
    number: signal.Signals, tmp_path: Path
) -> None:
    # The kernel gives the signal to another thread here. It is the same with a signal that
    # comes right before the wait.
    source = f"""
        import os, signal, sys, threading
        from shop import app

        def send():
            main = threading.main_thread().ident
            while sys._current_frames()[main].f_code.co_name != "poll":
                threading.Event().wait(0.001)
            os.kill(os.getpid(), {int(number)})

        sys.setswitchinterval(1e6)  # this thread runs only while the main one waits
        threading.Thread(target=send, daemon=True).start()
        signal.pthread_sigmask(signal.SIG_BLOCK, [{int(number)}])
        """
    write(tmp_path, "site_of_test", source)
    options = ("--", "--asyncore-loop-timeout=3600")
    with serving(tmp_path, *options, app="site_of_test:app") as command:
        assert command.end() == (0, [])


@each_signal
def test_a_response_in_the_middle_is_finished_and_then_its_task_runs(
    number: signal.Signals, tmp_path: Path
) -> None:
    with serving(tmp_path) as command:
        response = command.ask("/stream")
        assert response.readline() == b"first\n"
        command.stop_accepting(number)
        command.open_gate()
        assert response.read() == b"last\n"
        assert command.line() == "task ran"
        assert command.end() == (0, [])


@pytest.mark.parametrize("runner", ["pool", "inline"])
@pytest.mark.parametrize("path", ["/plain", "/coroutine"])
def test_the_exit_waits_for_tasks_and_for_the_tasks_that_they_add(
    path: str, runner: str, tmp_path: Path
) -> None:
    with serving(tmp_path, "--runner", runner) as command:
        assert command.ask(path).read() == b"ok\n"
        assert command.line() == "task begins"
        command.stop_accepting()
        command.open_gate()
        assert command.line() == "task ends"
        assert command.line() == "task of the task ran"
        assert command.end() == (0, [])


def test_requests_that_wait_for_a_thread_are_answered(tmp_path: Path) -> None:
    with serving(tmp_path, "--threads", "1") as command:
        connections = [command.request("/held") for _ in range(3)]
        assert command.line() == "request begins"
        command.stop_accepting()
        for connection in connections:
            command.open_gate()
            assert connection.getresponse().read() == b"ok\n"
        said = [command.line() for _ in range(5)]
        assert sorted(said) == 2 * ["request begins"] + 3 * ["task ran"]
        assert command.end() == (0, [])


def test_the_last_response_on_a_connection_announces_the_close(tmp_path: Path) -> None:
    with serving(tmp_path) as command:
        before = command.ask("/answer")
        assert before.headers["Connection"] is None
        connection = command.request("/held")
        assert command.line() == "request begins"
        command.stop_accepting()
        command.open_gate()
        response = connection.getresponse()
        assert (response.headers["Connection"], response.read()) == ("close", b"ok\n")
        assert command.line() == "task ran"
        assert command.end() == (0, [])


def test_a_large_response_is_sent_to_its_last_byte(tmp_path: Path) -> None:
    with serving(tmp_path) as command:
        response = command.ask("/large")
        assert command.line() == "task ran"
        command.stop_accepting()
        assert len(response.read()) == 20_000_000
        assert command.end() == (0, [])


def test_a_request_of_which_a_part_has_come_is_answered(tmp_path: Path) -> None:
    with serving(tmp_path) as command:
        connection = command.connect()
        connection.putrequest("POST", "/echo")
        connection.putheader("Content-Length", "6")
        connection.endheaders(b"abc")
        command.stop_accepting()
        connection.send(b"def")
        assert connection.getresponse().read() == b"abcdef"
        assert command.end() == (0, [])


def test_a_request_whose_client_has_left_is_finished_too(tmp_path: Path) -> None:
    options = ("--", "--channel-request-lookahead", "1")  # waitress notices that at once
    with serving(tmp_path, *options) as command:
        connection = command.request("/held")
        assert command.line() == "request begins"
        connection.close()
        command.stop_accepting()
        assert not command.ends_within(0.5)
        command.open_gate()
        assert command.line() == "task ran"
        assert command.end() == (0, [])


def test_an_idle_connection_is_closed_and_not_waited_for(tmp_path: Path) -> None:
    with serving(tmp_path) as command:
        silent, idle = command.connect(), command.request("/answer")
        assert idle.getresponse().read() == b"ok\n"
        command.stop_accepting()
        for connection in (silent, idle):
            assert connection.sock is not None
            assert connection.sock.recv(1) == b""
        assert command.end() == (0, [])


def test_a_stuck_task_is_named_once_and_the_status_is_1(tmp_path: Path) -> None:
    with serving(tmp_path, "--drain-timeout", "0.3") as command:
        assert command.ask("/plain").read() == b"ok\n"
        assert command.line() == "task begins"
        command.send(signal.SIGTERM)
        reason = "within the drain time of 0.3 seconds"
        assert command.end() == (1, [not_finished("shop.slow", reason)])


def test_a_stuck_request_is_counted_and_the_status_is_1(tmp_path: Path) -> None:
    with serving(tmp_path, "--drain-timeout", "0.3", "--threads", "1") as command:
        stuck, waiting = command.request("/held"), command.request("/held")
        assert command.line() == "request begins"
        command.send(signal.SIGTERM)
        assert command.end() == (
            1,
            [
                "ERROR:wsgi_bg:2 requests, their inline tasks included, were not finished "
                "within the drain time of 0.3 seconds: the process ends without them",
                not_finished("shop.task", "by the end of the process"),
            ],
        )
        for connection in (stuck, waiting):
            with pytest.raises(OSError):  # noqa: PT011  # reset, or closed unanswered
                connection.getresponse()


def test_a_response_that_its_client_does_not_read_is_counted(tmp_path: Path) -> None:
    with serving(tmp_path, "--drain-timeout", "0.3") as command:
        command.ask("/large")
        assert command.line() == "task ran"
        command.send(signal.SIGTERM)
        code, lines = command.end()
        assert code == 1
        assert [line.split(",")[0] for line in lines] == ["ERROR:wsgi_bg:1 requests"]


def test_a_request_that_never_comes_whole_is_not_counted(tmp_path: Path) -> None:
    with serving(tmp_path, "--drain-timeout", "0.3") as command:
        connection = command.connect()
        connection.putrequest("POST", "/echo")
        connection.putheader("Content-Length", "6")
        connection.endheaders(b"abc")
        command.send(signal.SIGTERM)
        assert command.end() == (0, [])


@each_signal
@pytest.mark.parametrize("path", ["/plain", "/held"])
def test_a_second_signal_names_the_tasks_and_ends_the_process(
    path: str, number: signal.Signals, tmp_path: Path
) -> None:
    with serving(tmp_path, "--drain-timeout", "3600") as command:
        command.request(path)
        assert command.line().endswith(" begins")
        command.stop_accepting()
        command.send(number)
        reason = f"before a second signal ({number.name})"
        name = "shop.slow" if path == "/plain" else "shop.task"
        assert command.end() == (-number, [not_finished(name, reason)])


def may_unshare() -> bool:
    done = subprocess.run(
        ["unshare", "--pid", "--fork", "--kill-child", "true"], capture_output=True, check=False
    )
    return done.returncode == 0


@pytest.mark.skipif(
    shutil.which("unshare") is None or not may_unshare(),
    reason="a PID namespace cannot be made here: that takes root and util-linux's unshare",
)
@each_signal
def test_a_second_signal_ends_a_container_without_an_init(
    number: signal.Signals, tmp_path: Path
) -> None:
    """The container's first process is PID 1, which no signal without a handler ends."""
    write(tmp_path, "shop", SHOP)
    first = ["unshare", "--pid", "--fork", "--kill-child", *MODULE]
    options = ["--port", "0", "--drain-timeout", "3600"]
    with running([*first, "shop:app", *options], tmp_path) as command:
        pid = command.child()
        assert command.ask("/plain").read() == b"ok\n"
        assert command.line() == "task begins"
        command.stop_accepting(number, pid)
        os.kill(pid, number)
        reason = f"before a second signal ({number.name})"
        assert command.end() == (128 + number, [not_finished("shop.slow", reason)])


def test_a_hangup_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    write(tmp_path, "shop", SHOP)
    with running(["nohup", *MODULE, "shop:app", "--port", "0"], tmp_path) as command:
        command.send(signal.SIGHUP)
        assert command.ask("/quick").read() == b"ok\n"
        assert command.line() == "task ran"
        command.send(signal.SIGTERM)
        code, _ = command.end()
        assert code == 0


@pytest.mark.parametrize(
    ("options", "path", "what"),
    [
        ((), "/plain", "1 background task (1 shop.slow)"),
        (("--runner", "inline"), "/plain", "1 request and 1 background task (1 shop.slow)"),
        ((), "/held", "1 request"),
    ],
)
def test_the_waiting_command_names_the_tasks(
    options: tuple[str, ...], path: str, what: str, tmp_path: Path
) -> None:
    with serving(tmp_path, *options) as command:
        command.request(path)
        assert command.line().endswith(" begins")
        command.send(signal.SIGTERM)
        assert command.next_error() == (
            f"WARNING:wsgi_bg:the process ends, and waits for {what}: for 29 s more at most; "
            "a second signal ends the wait"
        )
        command.open_gate()
        while command.line():
            pass
        assert command.end() == (0, [])


def test_a_waiting_request_whose_client_has_left_is_named(
    tmp_path: Path,
) -> None:
    options = ("--", "--channel-request-lookahead", "1")
    with serving(tmp_path, *options) as command:
        connection = command.request("/held")
        assert command.line() == "request begins"
        connection.close()
        command.send(signal.SIGTERM)
        assert "waits for 1 request:" in command.next_error()
        command.open_gate()
        assert command.line() == "task ran"
        assert command.end() == (0, [])


def test_a_runner_of_the_programs_own_keeps_its_drain_time(tmp_path: Path) -> None:
    write(tmp_path, "shop", SHOP)
    write(
        tmp_path,
        "program",
        """
        import signal, wsgi_bg
        from shop import app, say

        numbers = (signal.SIGTERM, signal.SIGINT)
        handlers = [signal.getsignal(number) for number in numbers]
        runner = wsgi_bg.PoolRunner(drain_timeout=0.3)
        left = wsgi_bg.serve(app, port=0, runner=runner)
        say(left.requests, [task.name for task in left.tasks], bool(left))
        say(handlers == [signal.getsignal(number) for number in numbers])
        """,
    )
    with running([sys.executable, "program.py"], tmp_path) as command:
        assert command.ask("/plain").read() == b"ok\n"
        assert command.line() == "task begins"
        command.send(signal.SIGINT)
        assert command.line() == "0 ['shop.slow'] True"
        assert command.line() == "True"
        reason = "within the drain time of 0.3 seconds"
        assert command.end() == (0, [not_finished("shop.slow", reason)])


def test_a_drain_time_larger_than_any_float_is_no_limit(tmp_path: Path) -> None:
    write(tmp_path, "shop", SHOP)
    source = (
        "import wsgi_bg, shop\nshop.say(wsgi_bg.serve(shop.app, port=0, drain_timeout=10**400))"
    )
    write(tmp_path, "program", source)
    with running([sys.executable, "program.py"], tmp_path) as command:
        command.send(signal.SIGINT)
        assert command.line() == "Unfinished(requests=0, tasks=[])"
        assert command.end() == (0, [])


# The server alone, in this process: requests that arrived before the stop, but were not read.


def finish(app: App, connect: Any, **options: Any) -> int:
    server = GracefulServer(app, {"listen": "127.0.0.1:0", "threads": 1, **options})
    connect(int(server.addresses[0].rpartition(":")[2]))
    server.stop()
    server.run()
    return server.finish(time.monotonic() + TIMEOUT, Notice())


def test_connections_that_wait_to_be_accepted_are_answered() -> None:
    clients: list[socket.socket] = []

    def connect(port: int) -> None:
        for _ in range(3):
            clients.append(socket.create_connection(("127.0.0.1", port), TIMEOUT))
            clients[-1].sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")

    assert finish(app_that(lambda environ: None), connect) == 0
    for client in clients:
        with client, client.makefile("rb") as received:
            status, *_, body = received.read().split(b"\r\n")
        assert (status, body) == (b"HTTP/1.1 200 OK", b"ok")


def test_no_more_connections_are_accepted_than_waitress_allows() -> None:
    clients: list[socket.socket] = []

    def connect(port: int) -> None:
        for _ in range(3):
            clients.append(socket.create_connection(("127.0.0.1", port), TIMEOUT))
            clients[-1].sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")

    seen: list[object] = []
    # The listener and the two triggers count.
    assert finish(app_that(seen.append), connect, connection_limit=5) == 0
    assert len(seen) == 2
    for client in clients:
        client.close()


def test_a_thread_that_waits_for_its_client_to_read_is_let_go() -> None:
    let_go = threading.Event()

    def body() -> Iterator[bytes]:
        server.stop()
        try:
            yield from itertools.repeat(bytes(1 << 20))
        finally:
            let_go.set()

    server = GracefulServer(
        app_that(lambda environ: None, headers=[], body=body),
        {"listen": "127.0.0.1:0", "threads": 1, "outbuf_high_watermark": 1},
    )
    port = int(server.addresses[0].rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), TIMEOUT) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
        server.run()
        assert server.finish(time.monotonic(), Notice()) == 1
        assert let_go.wait(TIMEOUT)
    assert threads_have_ended()
    server._close()  # the descriptors that stay open while a thread goes on


def threads_have_ended() -> bool:
    """True if no thread of waitress is left, apart from threads that are just ending."""
    threads = [each for each in threading.enumerate() if each.name.startswith("waitress-")]
    for thread in threads:
        thread.join(TIMEOUT)
    return not any(thread.is_alive() for thread in threads)


def test_the_threads_end_and_nothing_stays_open() -> None:
    assert finish(app_that(lambda environ: None), lambda port: None) == 0
    assert threads_have_ended()


def test_an_address_that_cannot_be_had_leaves_nothing_open() -> None:
    with pytest.raises(OSError, match="address"):
        GracefulServer(app_that(print), {"listen": "127.0.0.1:0 192.0.2.1:1"})
    assert threads_have_ended()


def test_an_ipv6_address_is_written_as_in_urls() -> None:
    listener = SimpleNamespace(effective_host="::1", effective_port=8080)
    assert graceful._address_of(listener) == "http://[::1]:8080"


# serve() itself.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": 1}, "host must be a name or an address; got 1"),
        ({"port": "80"}, "port must be a whole number or None; got '80'"),
        ({"port": True}, "port must be a whole number or None; got True"),
        ({"threads": True}, "threads must be a whole number; got True"),
        (
            {"drain_timeout": True},
            "drain_timeout must be a number of seconds or None; got True",
        ),
        ({"port": -1}, "port must be 0 to 65535, or None; got -1"),
        ({"threads": "4"}, "threads must be a whole number; got '4'"),
        ({"threads": 0}, "threads must be 1 or more; got 0"),
        ({"drain_timeout": "1"}, "drain_timeout must be a number of seconds or None; got '1'"),
        ({"drain_timeout": math.nan}, "drain_timeout must be 0 seconds or more, or None"),
        ({"runner": "poll"}, "runner must be 'inline', 'pool' or a runner object; got 'poll'"),
        ({"runner": ""}, "runner must be 'inline', 'pool' or a runner object; got ''"),
        ({"runner": False}, "runner must be 'inline', 'pool' or a runner"),
        ({"app": 1}, "app must be a WSGI application"),
        ({"thread": 4}, "Unknown adjustment 'thread'"),
    ],
)
def test_serve_refuses_options_before_listening(options: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        wsgi_bg.serve(**{"app": app_that(print), **options})


def test_serve_outside_of_the_main_thread_is_refused() -> None:
    with ThreadPoolExecutor() as other, pytest.raises(MainThreadError, match="main thread"):
        other.submit(wsgi_bg.serve, app_that(print)).result(TIMEOUT)


def test_serve_without_waitress_names_the_package_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "waitress", None)
    message = re.escape("pip install 'wsgi_bg[waitress]'")
    with pytest.raises(ImportError, match=message) as raised:
        wsgi_bg.serve(app_that(print))
    assert isinstance(raised.value, ExtraMissingError)
    assert raised.value.extra == "waitress"


def test_the_address_is_8080_of_this_host_unless_another_is_given() -> None:
    assert serving_options() == {"host": "127.0.0.1", "port": 8080}
    assert serving_options(host=None, port=0) == {"host": "127.0.0.1", "port": 0}
    assert serving_options(host="::1", port=None) == {"host": "::1", "port": 8080}
    for option in ({"listen": "*:80"}, {"unix_socket": "x"}, {"sockets": [1]}):
        assert serving_options(host=None, **option) == option


def serving_options(**options: Any) -> dict[str, Any]:
    return wsgi_bg_serving.complete(options)


@pytest.mark.parametrize("previous", [signal.SIG_IGN, None])
def test_the_signal_handlers_are_restored_if_python_knows_them(
    previous: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, Any]] = []

    def install(number: int, handler: Any) -> Any:
        calls.append((number, handler))
        return previous  # None for a handler that C code has set

    monkeypatch.setattr("signal.signal", install)
    with StopSignals(list):
        calls.clear()
    handler = signal.SIG_DFL if previous is None else previous
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    assert calls == [(number, handler) for number in numbers]


def test_the_process_ends_at_the_second_signal_even_if_the_log_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Real signals; the test only records the last signal, which would end this process."""
    raised: list[int] = []
    stops: list[str] = []

    def fail(reason: str) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("wsgi_bg.runners.shutdown.log_all_unfinished", fail)
    raise_signal = signal.raise_signal
    with StopSignals(lambda: stops.append("stop")):
        raise_signal(signal.SIGTERM)
        monkeypatch.setattr("signal.raise_signal", raised.append)
        monkeypatch.setattr("os._exit", raised.append)
        with pytest.raises(OSError, match="no space"):
            raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert (stops, raised) == (["stop"], [signal.SIGINT, 128 + signal.SIGINT])
