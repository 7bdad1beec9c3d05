"""A Flask view whose task is kept in a folder until it has run, whatever process dies.

    python examples/durable_app.py [PORT]
    curl -X POST http://127.0.0.1:8080/orders/7

Kill the process with kill -9 within two seconds, and start it again: ./log.txt has the order.
The tasks are in ./tasks until then.
"""

import os
import sys
import time

from flask import Flask

from wsgi_bg import BackgroundTasks, DurableRunner, registered_task, serve
from wsgi_bg.flask import Background

app = Flask(__name__)
Background(app, runner=DurableRunner("tasks"))


@registered_task(name="orders.charge")
def charge(order: int) -> None:
    time.sleep(float(os.environ.get("DELAY", "2")))  # seconds that a slow bank takes
    with open("log.txt", "a", encoding="utf-8") as log:
        log.write(f"Charged order {order}\n")


@app.post("/orders/<int:order>")
def take(order: int, tasks: BackgroundTasks) -> dict[str, str]:
    tasks.add_task(charge, order)
    return {"message": "Ordered"}


if __name__ == "__main__":
    serve(app, port=int(sys.argv[1]) if sys.argv[1:] else 8080)
