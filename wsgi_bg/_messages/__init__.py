"""Messages for other processes: arguments as text, the headers of a request, retries."""
