"""The middleware: the tasks of one request, and the response that runs them."""
