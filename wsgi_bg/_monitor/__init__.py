"""The status page: a WSGI application, its HTML page, script and style."""
