"""Capture: which parameter was used where, by which operation, and where the examples lie."""
