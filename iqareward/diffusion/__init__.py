"""Reference loop: difficulty-adaptive reinforcement learning for restoration models in diffusers."""
