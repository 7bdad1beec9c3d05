"""A folder of SQLite files that keeps rows: tasks that wait to run, messages to be sent."""
