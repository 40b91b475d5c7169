"""Shared by all scripts: flags, errors, ranks, random draws, signals, runs, metrics, files."""
