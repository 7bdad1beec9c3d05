"""Threads, signals, forks, exit and logging: the layer below all others."""
