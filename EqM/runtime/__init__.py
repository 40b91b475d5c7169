"""Shared by all scripts: flags and errors, ranks, random draws, signals, run folders, metrics,
files.
"""
