"""``PrometheusHooks``: metrics of the tasks for Prometheus."""

from wsgi_bg.prometheus.hooks import BUCKETS, PrometheusHooks

__all__ = ["BUCKETS", "PrometheusHooks"]
