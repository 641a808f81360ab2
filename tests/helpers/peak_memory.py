"""Memory that quantizing takes: `python tests/helpers/peak_memory.py MODEL [--layers N …] [OPTIONS of quantize]`.

The command runs in a process of its own, whose memory is read from /proc every few milliseconds (Linux). `own` is what
only that process holds, `stages` the same by what the command was doing, and `share` the same ÷ the bytes of the
model's weights. In `resident`, pages of the memory-mapped weights and of spilled states come on top, which the system
may drop or write whenever it needs the room. With `--layers`, the first N blocks are quantized as a model of their own.
Prints one JSON document a run.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors import safe_open

PERIOD = 0.005
QUASAR = "from quasar_cli.main import main; main()"
FIELDS = {"own": ("RssAnon",), "resident": ("RssAnon", "RssFile", "RssShmem")}


def first_blocks(model: Path, count: int, folder: Path) -> Path:
    """A model of the first blocks, whose files are links to the whole model's."""
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).symlink_to(path.resolve())
    config = json.loads((model / "config.json").read_text())
    config["num_hidden_layers"] = count
    config.pop("layer_types", None)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def weight_bytes(model: Path, layers: int) -> int:
    """Bytes of the tensors that a model of so many blocks has."""
    total = 0
    for path in model.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                block = name.partition(".layers.")[2].partition(".")[0]
                if not block or int(block) < layers:
                    part = file.get_slice(name)
                    size = 1
                    for length in part.get_shape():
                        size *= length
                    total += size * (4 if part.get_dtype() == "F32" else 2)
    return total


def watch(command: list[str], log: Path) -> tuple[int, dict[str, int], dict[str, int], float]:
    """Run a command: its exit status, the peaks of its memory in bytes, of `own` also by stage, and seconds."""
    begin, peaks, stages = time.perf_counter(), dict.fromkeys(FIELDS, 0), dict[str, int]()
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except OSError:
            break
        kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Rss")}
        for name, fields in FIELDS.items():
            peaks[name] = max(peaks[name], 1024 * sum(kilobytes.get(field, 0) for field in fields))
        stage = (log.read_text().splitlines() or [""])[-1].removesuffix(" ...")
        stages[stage] = max(stages.get(stage, 0), 1024 * kilobytes.get("RssAnon", 0))
        time.sleep(PERIOD)
    return process.wait(), peaks, stages, time.perf_counter() - begin


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--layers", type=int, nargs="*")
    arguments, options = parser.parse_known_args()
    whole = json.loads((arguments.model / "config.json").read_text())["num_hidden_layers"]
    for count in arguments.layers or [whole]:
        with tempfile.TemporaryDirectory(dir=arguments.model.parent) as made:
            place = Path(made)
            model = first_blocks(arguments.model, count, place / "model")
            command = [sys.executable, "-c", QUASAR, "quantize", str(model), "--output", str(place / "out")]
            status, peaks, stages, seconds = watch([*command, *options], place / "log")
            size = weight_bytes(model, count)
            figures = {"layers": count, "status": status, "weights": size, **peaks, "share": peaks["own"] / size}
            print(json.dumps({**figures, "seconds": round(seconds, 1), "stages": stages}), flush=True)
            if status:
                print((place / "log").read_text(), file=sys.stderr)
            shutil.rmtree(place / "model")


if __name__ == "__main__":
    main()
