"""Record pairs from many processes at once: `python tests/helpers/record_many.py FOLDER COUNT`; in QUASAR_HOME."""

import os
import sys
from pathlib import Path

from quasar_core import store


def main() -> None:
    """Fork them all, let them start together, and end with the number of those that failed."""
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    waiting, start = os.pipe()
    children = []
    for number in range(count):
        child = os.fork()
        if child == 0:
            os.close(start)
            os.read(waiting, 1)  # until the parent closes its end
            code = 1
            try:
                store.record_pair("demo", folder / f"verifier-{number}")
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    os.close(start)
    sys.exit(sum(os.waitpid(child, 0)[1] != 0 for child in children))


if __name__ == "__main__":
    main()
