"""`quasar quantize --bits auto`: the candidates, the table that was chosen from, and what would help."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quasar_cli import console
from quasar_core.config import Offload, QuantizeConfig
from quasar_core.errors import UsageError

if TYPE_CHECKING:
    from quasar_core.choose_bits import Wanted


@dataclass(frozen=True)
class Streaming:
    """How decoding will stream the target: see `LoadOptions`."""

    offload: Offload = "auto"
    memory: int | None = None  # bytes

    def refuse(self) -> None:
        """UsageError where anything was asked for."""
        if self != Streaming():
            raise UsageError("--offload and --decode-memory go with --bits auto, which chooses for them.")


@dataclass
class Chooser:
    """Chooses once; `chosen` is what the JSON document says of it."""

    wanted: "Wanted"
    as_json: bool
    chosen: dict[str, Any] = field(default_factory=dict)

    def show_candidates(self, max_memory: int | None) -> None:
        """`--dry-run`: what would be tried, and what that and making the largest would take; then what cannot fit."""
        from quasar_core.api import quantizing
        from quasar_core.choose_bits import plan_choice

        found, plan = plan_choice(self.wanted, max_memory)
        if self.as_json:
            tried = {"candidates": found.describe(), "heads": found.heads}
            console.print_json({**tried, **plan.to_dict()})
        else:
            from quasar_cli.render.choice import candidates_table
            from quasar_cli.render.quantize import plan_table

            console.show(candidates_table(found.describe(), found.heads), plan_table(plan))
            if found.streaming:
                console.note_plain(found.streaming.describe())
        quantizing.refuse_what_cannot_fit(plan, self.wanted.output)

    def choose(self, force: bool, resume: bool, max_memory: int | None) -> QuantizeConfig:
        """The config of what was chosen; the table is shown, unless a JSON document is to come."""
        from quasar_core.bench.verifiers.choose import advice
        from quasar_core.choose_bits import choose

        with console.progress_bar() as progress:
            config, choice = choose(
                self.wanted,
                force=force,
                resume=resume,
                max_memory=max_memory,
                progress=progress,
                tell=console.note_plain,
            )
        self.chosen = {"choice": {**choice.to_dict(), "advice": advice(choice)}}
        if not self.as_json:
            from quasar_cli.render.choice import choice_table

            console.show(choice_table(choice))
            for sentence in advice(choice):
                console.note_plain(sentence)
        if choice.trouble:
            console.note_plain(f"Costs may be off: {choice.trouble}.")
        return config
