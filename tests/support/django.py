"""Configures Django for all tests: a process can configure Django only once."""

from __future__ import annotations

import django
from django.conf import settings
from django.db import models
from django.test import RequestFactory

__all__ = ["Order", "RequestFactory", "settings"]

settings.configure(
    ALLOWED_HOSTS=["*"],
    # A test that uses the database replaces the name by a file of its own.
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    LOGGING_CONFIG=None,
)
django.setup()


class Order(models.Model):  # type: ignore[misc]  # Django has no types
    """A row that a view or a task writes."""

    class Meta:
        app_label = "tests"
