"""Recorded answers replayed under other decisions."""
