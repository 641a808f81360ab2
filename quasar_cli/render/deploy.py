"""Draw the plan of a deployment."""

import json

from rich.console import RenderableType

from quasar_cli.render import facts_table
from quasar_core.deploy.planning import Plan


def plan_table(plan: Plan) -> RenderableType:
    """What the command promises, what it cannot do, and how that is known."""
    facts = [
        ("promise", plan.promise),
        *(("cannot" if not place else "", limit) for place, limit in enumerate(plan.limits)),
        ("checkpoint", plan.checkpoint),
        ("version", plan.version),
        ("checked", plan.checked),
    ]
    for option, content in plan.command.config.items():
        facts.append((option.removeprefix("--"), json.dumps(content)))
    return facts_table(facts)
