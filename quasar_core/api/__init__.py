"""The composition root: what the command line calls, a module for each kind of work, as each loads what it needs."""
