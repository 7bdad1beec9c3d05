"""Tasks that threads of the package send to other processes, after the response."""
