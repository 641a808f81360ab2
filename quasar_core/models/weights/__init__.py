"""Bring weights from files to their places in memory, or stream them past at each pass."""
