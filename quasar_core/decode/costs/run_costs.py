"""Know what the passes of one run cost: what is known of the pair, corrected by the passes of the run itself."""

import time
from collections.abc import Callable

from quasar_core.config import GenerationConfig
from quasar_core.decode.costs.cost_records import Role, forget_cost, pair_costs, pass_sampler, positions_seen
from quasar_core.decode.costs.pass_costs import KNOWN, LiveCost, PairCosts
from quasar_core.models.pair import Pair
from quasar_core.system import Load

CHECKED_TOKENS = 16  # room of the cache that passes are checked over


class RunCosts:
    """The costs that one generator goes by; nothing is measured before they are asked for."""

    def __init__(
        self,
        pair: Pair,
        config: GenerationConfig,
        note: Callable[[str], None],
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._pair, self._config, self._note, self._now = pair, config, note, now
        self._corrected: PairCosts | None = None
        self.live: dict[Role, LiveCost] = {}  # of the models whose costs were asked for

    @property
    def verifying(self) -> Role:
        """Whose passes verify, unless the target does so alone."""
        pair = self._pair
        uses_verifier = pair.target is None or (self._config.verify != "full" and pair.verifier is not None)
        return "verifier" if uses_verifier else "target"

    @property
    def observe(self) -> Callable[[int, float], None] | None:
        """What takes the times of the target's passes; None where its costs do not count."""
        return self.live["target"].observe if "target" in self.live else None

    def corrected(self) -> PairCosts:
        """What is known of the models' passes, corrected by those of this run."""
        if self._corrected is None:
            known = set(self._pair.measured)
            costs = pair_costs(self._pair, with_verifier=self._config.verify != "full")
            for role in sorted(self._pair.measured.keys() - known):
                self._note(f"cost: {self._pair.measured[role].describe()}")
            verify = self.live[self.verifying] = LiveCost(costs.verify)
            if "target" in self._pair.measured:
                self.live.setdefault("target", LiveCost(costs.confirm))
            self._corrected = PairCosts(verify, self.live.get("target", verify))
        return self._corrected

    def move_to(self, positions: int, pair: Pair) -> None:
        """The next pass of the pair stands behind so many positions; a model may see fewer."""
        for role, live in self.live.items():
            live.move_to(positions_seen(pair.target if role == "target" else pair.verifier, positions))

    def check_memory(self) -> bool:
        """Time a few passes of both models where their costs are remembered; whether that was done.

        A verifier that a wrong memory calls dear would never run, and so never be corrected.
        """
        remembered: list[Role] = [role for role in self.live if self._pair.measured[role].remembered]
        for role in remembered:
            model = self._pair.target if role == "target" else self._pair.verifier
            assert model is not None
            sample = pass_sampler(model, self._pair.new_cache(CHECKED_TOKENS), 1, self._now)
            for _ in range(KNOWN):
                self.live[role].observe(1, sample())
        return bool(remembered)

    def forget_passes(self, role: Role) -> None:
        """Go by what was known of a model again, as another one ran in its place."""
        if role in self.live:
            self.live[role].forget()

    def forget_what_was_wrong(self, load: Load) -> None:
        """What passes of this run contradict is measured anew by the next; a busy machine contradicts nothing."""
        for role, live in self.live.items():
            if live.contradicts and not load.is_busy and self._pair.measured[role].remembered:
                forget_cost(self._pair, role)
                self._note(f"cost: what was remembered of the {role}'s passes was wrong, and is measured next time")
