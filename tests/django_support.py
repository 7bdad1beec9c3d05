"""Django, which a process can configure once: importing this module does, for all tests."""

from __future__ import annotations

import django
from django.conf import settings
from django.db import models
from django.test import RequestFactory

__all__ = ["Order", "RequestFactory", "settings"]

settings.configure(
    ALLOWED_HOSTS=["*"],
    # A test that uses it gives it a file of its own.
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    LOGGING_CONFIG=None,
)
django.setup()


class Order(models.Model):  # type: ignore[misc]  # Django has no types
    """What a view writes, or a task."""

    class Meta:
        app_label = "tests"
