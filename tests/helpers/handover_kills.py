"""Kill quantizations at each step of handing over finished work: `python tests/helpers/handover_kills.py FOLDER`.

Each step where an older verifier stood in the output's place, some where nothing did. Prints what was found
after the kill and after the same command ran again, as one JSON document.
"""

import json
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from helpers.kill_runs import finish
from helpers.quantize_cases import CONFIG, quantize, save_model

from quasar_core.quantize import calibration, handover, run
from quasar_core.store import current_pair
from quasar_core.store.folders import STEPS

ALONE = ("in place",)  # steps that are tried without an older verifier too
WORK = ("load_calibration", "quantize_with", "assemble", "measure")


def fork(source: Path, output: Path, die_at: str | None = None, work: bool = True, **options: Any) -> bool:
    """Quantize in a process of its own, which dies at a step, and fails where it does work that it should not do."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with open(output.parent / "stderr", "w") as log:
                os.dup2(log.fileno(), 2)
            if die_at:
                handover.reached = lambda step: os.kill(os.getpid(), signal.SIGKILL) if step == die_at else None
            for name in () if work else WORK:
                setattr(run, name, None)
            quantize(source, output=output, **options)
            code = 0
        finally:
            os._exit(code)
    return finish(child)


def found(output: Path) -> dict[str, Any]:
    """What lies beside and in the output, and which pair is current."""
    beside = sorted(path.name for path in output.parent.iterdir() if path.name not in ("home", "stderr"))
    inside = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
    pair = current_pair()
    return {"beside": beside, "inside": inside, "current": pair.verifier if pair else None}


def try_step(template: Path, source: Path, folder: Path, step: str, older: Path | None) -> dict[str, Any]:
    """Kill a run that has all its work done, and run it again with no work allowed."""
    folder.mkdir()
    os.environ["QUASAR_HOME"], output = str(folder / "home"), folder / "out"
    shutil.copytree(template, folder / "out.partial")
    if older:
        shutil.copytree(older, output)
    killed = not fork(source, output, die_at=step, work=False, force=older is not None)
    after_kill = found(output)
    again = step == "unlocked" or fork(source, output, work=False, force=older is not None)
    card = json.loads((output / "quasar.json").read_text())
    config = card["report"]["config"]
    return {"killed": killed, "after": after_kill, "again": again, "end": found(output), "seed": config["seed"]}


def main() -> None:
    """Make one whole working folder and one older verifier, and try every step with copies of them."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    calibration.HELD_OUT_ROWS, calibration.GREEDY_LENGTH = 3, 40
    source = save_model(folder / "tiny", tied=False)
    os.environ["QUASAR_HOME"] = str(folder / "home")
    fork(source, folder / "older", config=replace(CONFIG, seed=7))
    fork(source, folder / "out", die_at="described")
    document = {
        f"{'older' if older else 'empty'}, {step}": try_step(
            folder / "out.partial", source, folder / f"{number}-{bool(older)}", step, older
        )
        for older in (None, folder / "older")
        for number, step in enumerate(STEPS)
        if older or step in ALONE
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
