"""A Flask view that answers at once and sends its mail after the answer.

    wsgi-bg examples.flask_app:app [--port PORT]
    curl -X POST http://127.0.0.1:8080/send-notification/ada@example.com

Two seconds later ./log.txt has the mail. Plain waitress: python examples/flask_app.py [PORT]
"""

import os
import sys
import time

from flask import Flask
from waitress import create_server

from wsgi_bg import BackgroundTasks
from wsgi_bg.flask import Background

DELAY = float(os.environ.get("DELAY", "2"))  # seconds that a slow mail server takes
app = Flask(__name__)
Background(app, runner="pool")


def send_mail(recipient: str, subject: str) -> None:
    time.sleep(DELAY)
    with open("log.txt", "a", encoding="utf-8") as log:
        log.write(f"To {recipient}: {subject}\n")


@app.post("/send-notification/<email>")
def send_notification(email: str, tasks: BackgroundTasks) -> dict[str, str]:
    tasks.add_task(send_mail, email, subject="You have news")
    return {"message": "Notification sent in the background"}


if __name__ == "__main__":
    server = create_server(app, host="127.0.0.1", port=sys.argv[1] if sys.argv[1:] else 8080)
    print(f"Serving on http://127.0.0.1:{server.effective_port}", flush=True)
    server.run()
