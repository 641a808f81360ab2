"""Verifiers that do less: with a head of some tokens, or with a narrow view of a long text."""
