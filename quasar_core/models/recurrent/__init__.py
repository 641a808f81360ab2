"""Layers with a state instead of keys and values: their rules, in PyTorch and in C++, and states to go back to."""
