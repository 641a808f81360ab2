"""The moments at which finished work changes hands: a process may end at any of them, and nothing is lost."""

STEPS = (
    "described",  # the working folder is whole
    "set aside",  # a verifier that stood in the output's place is renamed
    "in place",  # the output has its name
    "commits cleared",
    "replaced one removed",
    "recorded",  # in pairs.json
    "unlocked",  # nothing is left to do
)


def reached(step: str) -> None:
    """Do nothing; tests end the process here."""
