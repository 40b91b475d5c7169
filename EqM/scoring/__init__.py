"""Scores of generated clips against real ones, and the manifest of all that they depend on."""
