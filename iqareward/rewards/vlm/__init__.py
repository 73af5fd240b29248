"""Rewards from vision-language models of transformers, in process or behind a server: prompts, inputs, read-out."""
