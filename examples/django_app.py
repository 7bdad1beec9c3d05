"""A Django view that answers at once and sends its mail two seconds later, to log.txt.

python examples/django_app.py [PORT]
curl -d email=ada@example.com http://127.0.0.1:8080/subscribe
"""

import os
import sys
import time

from django import http, urls
from django.conf import settings
from waitress import create_server

from wsgi_bg import background_tasks
from wsgi_bg.django import get_wsgi_application

DELAY = float(os.environ.get("DELAY", "2"))  # seconds that a slow mail server takes


def send_mail(recipient: str) -> None:
    time.sleep(DELAY)
    with open("log.txt", "a", encoding="utf-8") as log:
        log.write(f"To {recipient}: You are subscribed\n")


def subscribe(request: http.HttpRequest) -> http.HttpResponse:
    background_tasks.add_task(send_mail, request.POST["email"])
    return http.HttpResponse("Thank you\n")


urlpatterns = [urls.path("subscribe", subscribe)]
settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["127.0.0.1"])
app = get_wsgi_application(runner="pool")

if __name__ == "__main__":
    server = create_server(app, host="127.0.0.1", port=sys.argv[1] if sys.argv[1:] else 8080)
    print(f"Serving on http://127.0.0.1:{server.effective_port}", flush=True)
    server.run()
