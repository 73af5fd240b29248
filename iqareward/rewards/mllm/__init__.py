"""Rewards from multimodal language models: token ids, exact preprocessing, read-out; `owl2/` is the network itself."""
