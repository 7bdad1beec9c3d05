"""``Monitor``: a web page that shows the tasks, as a WSGI application to mount anywhere."""

from wsgi_bg.monitor.application import Monitor

__all__ = ["Monitor"]
