"""Rewards by the features of CLIP models."""
