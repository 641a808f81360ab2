"""The architectures that the lean decoder runs: one skeleton, a row of switches each.

A row says where an architecture departs from Llama's skeleton; a switch may name the option of config.json that sets
it. `docs/architectures.md` shows how to add one, and `models/config/decoder.py` reads a config.json by its row.
"""

from quasar_core.models.architectures.dense import DENSE
from quasar_core.models.architectures.mixtures import MIXTURES
from quasar_core.models.architectures.recurrent import RECURRENT
from quasar_core.models.architectures.row import Architecture

ARCHITECTURES: dict[str, Architecture] = {**DENSE, **RECURRENT, **MIXTURES}
