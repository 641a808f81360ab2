"""Write from many processes at once: `python tests/helpers/record_many.py pairs|times COUNT`; in QUASAR_HOME."""

import os
import sys
from pathlib import Path

from quasar_core import store
from quasar_core.store.measured import Measured, measured_file


def record_pair(number: int) -> None:
    """Record a pair of a number."""
    store.record_pair("demo", Path(f"verifier-{number}"))


def keep_time(number: int) -> None:
    """Keep a measured value of a number."""
    Measured(measured_file("times", {}), {}, float).keep({str(number): 1.0 + number})


def main() -> None:
    """Fork them all, let them start together, and end with the number of those that failed."""
    write, count = {"pairs": record_pair, "times": keep_time}[sys.argv[1]], int(sys.argv[2])
    waiting, start = os.pipe()
    children = []
    for number in range(count):
        child = os.fork()
        if child == 0:
            os.close(start)
            os.read(waiting, 1)  # until the parent closes its end
            code = 1
            try:
                write(number)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    os.close(start)
    sys.exit(sum(os.waitpid(child, 0)[1] != 0 for child in children))


if __name__ == "__main__":
    main()
