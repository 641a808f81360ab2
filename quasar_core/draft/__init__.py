"""Draft tokens: the drafters that `--draft` names, and the protocol for others.

A package of somebody else's adds a drafter by an entry point of the group `quasar.drafters`, whose name is what
`--draft` takes, and whose object, called without arguments, gives a new drafter for each answer:

    [project.entry-points."quasar.drafters"]
    alphabet = "my_package:AlphabetDrafter"

The class inherits from `Drafter`, and proposes drafts made by `Draft.of(tokens, source, sureness)`. Whatever it
proposes, the output stays what it would be without: drafts only save passes. `docs/drafters.md` has an example.
"""

from quasar_core.draft.base import NO_DRAFT, Draft, Drafter, Piece

__all__ = ["NO_DRAFT", "Draft", "Drafter", "Piece"]
