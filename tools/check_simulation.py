"""Compare the replayed speed of exact, as it was recorded, with the measured one: an error beyond 5 %.

python -m tools.check_simulation results.json
"""

import sys
from pathlib import Path

from quasar_core.bench.results import read_results
from quasar_core.bench.simulation.simulate import simulate

MOST = 0.05


def main() -> int:
    """Print both speeds of each policy that was measured; 1 where the recorded one is off."""
    predictions = simulate(read_results(Path(sys.argv[1])))
    for one in predictions:
        if one.ratio is not None:
            print(
                f"{one.policy}: predicted {one.predicted:.1f} ± {one.spread:.1f}, measured {one.measured:.1f} tokens/s "
                f"({one.ratio:.3f})"
            )
    recorded = predictions[0].ratio
    return int(recorded is None or abs(recorded - 1) > MOST)


if __name__ == "__main__":
    sys.exit(main())
