"""Find drafters of other packages: entry points of the group `quasar.drafters`, which `--draft NAME` names."""

from importlib.metadata import EntryPoint, entry_points

from quasar_core.config import DRAFTERS_GROUP
from quasar_core.draft.base import Drafter
from quasar_core.errors import QuasarError, UsageError, reason


def load_plugin(name: str) -> Drafter:
    """A new drafter of another package: what its entry point names is called without arguments.

    UsageError for a name that nothing has registered, QuasarError for one that cannot be loaded or is no drafter.
    """
    found = find_plugin(name)
    if found is None:
        raise UsageError(f"--draft {name}: no installed package registers a drafter of this name.")
    try:
        drafter: Drafter = found.load()()
    except Exception as error:  # whatever another package raises
        raise QuasarError(f"The drafter {name} ({found.value}) could not be loaded: {reason(error)}.") from error
    missing = [verb for verb in ("observe", "forget", "propose") if not callable(getattr(drafter, verb, None))]
    if missing or Drafter not in type(drafter).__mro__:
        what = f"has no {', '.join(missing)}" if missing else "does not inherit from quasar_core.draft.Drafter"
        raise QuasarError(f"The drafter {name} ({found.value}) {what}.")
    return drafter


def find_plugin(name: str) -> EntryPoint | None:
    """The entry point of a name; of several packages that register it, the first."""
    return next(iter(entry_points(group=DRAFTERS_GROUP, name=name)), None)
