"""``Background``: the Flask extension."""

from wsgi_bg.flask.extension import Background

__all__ = ["Background"]
