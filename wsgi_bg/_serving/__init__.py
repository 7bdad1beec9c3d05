"""``wsgi-bg``: serves an application with waitress, and drains on SIGTERM."""
