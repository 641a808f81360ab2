"""Cheaper verifiers: with a head of some tokens, or with attention to a part of a long text."""
