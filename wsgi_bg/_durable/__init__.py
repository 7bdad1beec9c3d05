"""Durable tasks: a folder of SQLite files that keeps tasks until they have run."""
