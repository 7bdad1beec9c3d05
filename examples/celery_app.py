"""A Flask view with a light task, which runs in this process, and a heavy task for Celery.

    python examples/celery_app.py [PORT]
    celery -A examples.celery_app:queue worker
    curl -X POST http://127.0.0.1:8080/reports/ada@example.com

./log.txt soon has a mail, and the report once a worker runs, now or later. Messages are files
in ./queue, for trying only; set BROKER=redis://localhost for both commands to use Redis.
"""

import os
import sys
import time

from celery import Celery
from flask import Flask

from wsgi_bg import BackgroundTasks, registered_task, serve
from wsgi_bg.celery import CeleryRunner
from wsgi_bg.flask import Background

app = Flask(__name__)
queue = Celery("reports", broker=os.environ.get("BROKER", "filesystem://"))
folders = ("data_folder_in", "data_folder_out", "control_folder")
queue.conf.broker_transport_options = dict.fromkeys(folders, "queue")
os.makedirs("queue", exist_ok=True)
Background(app, runner=CeleryRunner(queue))


def write(line: str) -> None:
    time.sleep(float(os.environ.get("DELAY", "2")))  # seconds
    with open("log.txt", "a", encoding="utf-8") as log:
        log.write(f"{line}\n")


@registered_task(name="reports.make", celery={"acks_late": True})
def make_report(email: str) -> None:
    write(f"Report for {email}")


@app.post("/reports/<email>")
def order(email: str, tasks: BackgroundTasks) -> dict[str, str]:
    tasks.add_task(write, f"To {email}: Your report is on its way")
    tasks.add_task(make_report, email)
    return {"message": "Report ordered"}


if __name__ == "__main__":
    serve(app, port=int(sys.argv[1]) if sys.argv[1:] else 8080)
