"""Programs that measure; never tests: absolute times differ from machine to machine."""
