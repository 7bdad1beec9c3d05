"""Durable tasks: the runner that keeps tasks in a folder until they have run."""
