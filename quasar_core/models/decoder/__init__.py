"""The lean decoder: its blocks, what they are made of, and its cache."""
