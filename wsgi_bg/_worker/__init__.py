"""The worker's side of every engine: calls of registered functions, by name."""
