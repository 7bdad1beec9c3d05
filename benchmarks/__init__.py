"""Benchmark programs, and no tests: absolute times differ from machine to machine."""
