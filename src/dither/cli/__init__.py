"""The commands: one file each, found by name in main.py."""
