"""The composition root: what the command line calls, and what a program that imports quasar calls."""
