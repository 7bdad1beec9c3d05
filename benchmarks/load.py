"""Loads a server with wrk if installed (Debian's package), else with a client in Python.

``python -m benchmarks.load PORT SECONDS CONNECTIONS`` starts the Python client, in a separate
process. The Python client uses more CPU than wrk, so do not compare their figures.
"""

from __future__ import annotations

import http.client
import json
import re
import shutil
import subprocess
import sys
import time
from threading import Thread
from typing import NamedTuple

from benchmarks.measure import quantile


class Load(NamedTuple):
    """A client's figures: requests a second, and latencies in milliseconds."""

    rate: float
    p50: float
    p99: float


WRK = shutil.which("wrk")
NAME = "wrk" if WRK else "a client in Python (wrk is not installed)"
_MILLISECONDS = {"us": 0.001, "ms": 1.0, "s": 1000.0, "m": 60_000.0}


def put_load(port: int, seconds: int, connections: int) -> Load:
    """Request ``/`` on all connections at once, without a pause on any connection.

    :raises RuntimeError: if a response says that something failed.
    """
    if WRK is None:
        command = [sys.executable, "-m", __name__, str(port), str(seconds), str(connections)]
    else:
        sizes = ["--threads=1", f"--connections={connections}", f"--duration={seconds}s"]
        command = [WRK, *sizes, "--latency", f"http://127.0.0.1:{port}/"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if WRK is None:
        return Load(*json.loads(said))
    if "Non-2xx" in said:
        raise RuntimeError(said)
    if errors := re.search(r"Socket errors: .*", said):  # probably a slow server
        print(errors[0], file=sys.stderr)
    rate = re.search(r"Requests/sec:\s+([\d.]+)", said)
    parts = dict(re.findall(r"^ +(50|99)% +([\d.]+[a-z]+) *$", said, re.MULTILINE))
    assert rate is not None
    return Load(float(rate[1]), _milliseconds(parts["50"]), _milliseconds(parts["99"]))


def _milliseconds(time_of_wrk: str) -> float:
    number = time_of_wrk.rstrip("ums")
    return float(number) * _MILLISECONDS[time_of_wrk[len(number) :]]


def _fetch_until(end: float, port: int, taken: list[float]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    while (began := time.monotonic()) < end:
        connection.request("GET", "/")
        response = connection.getresponse()
        response.read()
        if response.status >= 300:
            raise RuntimeError(response.status)
        taken.append((time.monotonic() - began) * 1000)


def main(port: int, seconds: int, connections: int) -> None:
    taken: list[float] = []
    end = time.monotonic() + seconds
    arguments = (end, port, taken)
    threads = [Thread(target=_fetch_until, args=arguments) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps([len(taken) / seconds, quantile(taken, 0.5), quantile(taken, 0.99)]))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
