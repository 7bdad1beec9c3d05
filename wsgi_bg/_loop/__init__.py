"""The event loop of the async tasks: its thread, and the portal to call it."""
