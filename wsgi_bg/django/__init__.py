"""``get_wsgi_application()``: Django's application, with background tasks.

The function replaces Django's function of the same name in ``wsgi.py``. Django's test client
calls no WSGI application. To give its requests background tasks too, import this package or
put ``"wsgi_bg.django"`` into ``INSTALLED_APPS``.
"""

from wsgi_bg.django.application import get_wsgi_application
from wsgi_bg.django.client import follow_test_clients

__all__ = ["get_wsgi_application"]

follow_test_clients()
