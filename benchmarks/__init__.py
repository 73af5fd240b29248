"""Measurements against what a user would pick instead; run by hand, never as a timed test."""
