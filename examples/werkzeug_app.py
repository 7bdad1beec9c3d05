"""A Werkzeug application that answers at once and writes its welcome after the answer.

    python examples/werkzeug_app.py [PORT]
    curl -d name=Ada http://127.0.0.1:8080/

Two seconds after the answer log.txt in the current directory has the welcome.
"""

import os
import sys
import time

from waitress import create_server
from werkzeug import Request, Response

from wsgi_bg import BackgroundTasksMiddleware, background_tasks

DELAY = float(os.environ.get("DELAY", "2"))  # seconds that a slow mail server takes


def welcome(name: str) -> None:
    time.sleep(DELAY)
    with open("log.txt", "a", encoding="utf-8") as log:
        log.write(f"Welcome, {name}\n")


@Request.application
def sign_up(request: Request) -> Response:
    name = request.form.get("name", "nobody")
    background_tasks.add_task(welcome, name)
    return Response(f"{name} is on the list\n")


if __name__ == "__main__":
    app = BackgroundTasksMiddleware(sign_up, runner="pool")
    server = create_server(app, host="127.0.0.1", port=sys.argv[1] if sys.argv[1:] else 8080)
    print(f"Serving on http://127.0.0.1:{server.effective_port}", flush=True)
    server.run()
