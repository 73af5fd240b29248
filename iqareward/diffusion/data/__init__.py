"""Pairs of degraded and clean images to learn restoration from: synthetic, or from folders of files."""
