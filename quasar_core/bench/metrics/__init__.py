"""The figures of a run, from its result file alone; each defined in docs/measuring.md."""
