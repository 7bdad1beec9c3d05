"""Tests of wsgi_bg.status and wsgi_bg._status."""
