"""Rewards for other people's trainers, one module per trainer or family of trainers."""
