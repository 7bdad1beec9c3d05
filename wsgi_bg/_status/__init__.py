"""Records the state of tasks for :mod:`wsgi_bg.status`, in a process and across processes."""
