"""A Django application with a ``CeleryRunner``: the module that a worker of the tests loads.

Celery's own support for Django is off: the variable ``DJANGO_SETTINGS_MODULE`` is not set.
"""

from __future__ import annotations

import json
import os
import threading
from typing import TYPE_CHECKING

from asgiref.sync import sync_to_async

from tests.support.celery_shop import make_app
from tests.support.files import append
from wsgi_bg import registered_task
from wsgi_bg.celery import CeleryRunner

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

MODULE = "tests.support.celery_django"


def connect(path: str) -> None:
    """Note if the thread has a connection already; then connect."""
    from django.db import connection

    found: BaseDatabaseWrapper = connection
    state = "open" if found.connection else "closed"
    name = "main" if threading.current_thread() is threading.main_thread() else "other"
    append(path, f"{state} on the {name} thread")
    found.ensure_connection()


@registered_task
def query(path: str) -> None:
    connect(path)


@registered_task
async def query_async(path: str) -> None:
    await sync_to_async(connect)(path)


if "SHOP_BROKER" in os.environ:
    from django.conf import settings

    settings.configure(
        DATABASES={
            "default": {
                "ENGINE": "django.db.backends.sqlite3",
                "NAME": os.environ["SITE_DATABASE"],
            }
        },
        ROOT_URLCONF=MODULE,
        SECRET_KEY="secret",
    )
    from wsgi_bg.django import get_wsgi_application

    app = make_app(*json.loads(os.environ["SHOP_BROKER"]))
    application = get_wsgi_application(CeleryRunner(app))
