"""The seam through which the pytest plugin sees requests; the plugin's tests try the rest."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support import Server, make_environ
from tests.support.recording import done, fail, send, stream, whole
from wsgi_bg import PoolRunner
from wsgi_bg._request.body import Body
from wsgi_bg._request.observer import RequestObserver, observers


@pytest.mark.parametrize("app", [whole, stream])
def test_an_observer_that_overrides_nothing_changes_nothing(app: Any) -> None:
    done.clear()
    server = Server()
    pool = PoolRunner()
    with observers.registered(lambda tasks, environ: RequestObserver()):
        body = app(fail, (send, "ada"), runner=pool)(make_environ(), server.start_response)
    assert isinstance(body, Body)
    assert list(body) in ([b"ok"], [b"o", b"k"])
    body.close()
    assert pool.drain(10) == []
    assert done == ["ada"]


def test_a_request_keeps_its_observer_and_the_next_has_none() -> None:
    batches: list[Any] = []

    class Keeps(RequestObserver):
        def submit(self, batch: Any, runner: Any) -> None:
            batches.append(batch)

    done.clear()
    with observers.registered(lambda tasks, environ: Keeps()):
        body = stream((send, "ada"))(make_environ(), Server().start_response)
    Server().run(whole((send, "grace")), make_environ())
    body.close()
    assert done == ["grace"]
    [batch] = batches
    batch.run()
    assert done == ["grace", "ada"]
