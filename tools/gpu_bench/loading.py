"""Part of a GPU bench: how fast tensors come from files to the device, by our upload and by plain copies."""

import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from quasar_core.checkpoint.tensor_files import TensorFiles
from quasar_core.models.weights.upload import Upload
from tools.gpu_bench.models import Bench
from tools.gpu_bench.passes import synchronize

PART = "loading"
TENSORS, ELEMENTS, DRY_ELEMENTS = 8, 1 << 28, 1 << 16  # 8 · 2^28 · 2 bytes are 4 GB


def run(bench: Bench) -> None:
    """Write a file of the size of a shard, then read it: from the page cache, since nothing may be dropped from it."""
    bench.report.attempt(PART, "upload", lambda: time_upload(bench))


def time_upload(bench: Bench) -> None:
    """GB per second of both ways."""
    plan = bench.plan
    count = DRY_ELEMENTS if plan.dry else ELEMENTS
    with tempfile.TemporaryDirectory() as folder:
        # Not zeros: a file system may store those as nothing.
        tensors = {f"t{i}": torch.arange(count, dtype=torch.int16).view(torch.bfloat16) for i in range(TENSORS)}
        save_file(tensors, Path(folder) / "model.safetensors")
        del tensors
        files = TensorFiles(Path(folder))
        places = {name: torch.empty(count, device=plan.device, dtype=torch.bfloat16) for name in files.names()}
        for way, load in (("upload", _upload), ("plain copies", _copy)):
            start = time.perf_counter()
            load(files, places)
            synchronize(plan.device)
            seconds = time.perf_counter() - start
            size = sum(place.nbytes for place in places.values())
            bench.report.add(PART, way=way, bytes=size, seconds=seconds, gb_per_s=size / seconds / 1e9)


def _upload(files: TensorFiles, places: dict[str, torch.Tensor]) -> None:
    with Upload(next(iter(places.values())).device) as upload:
        for name, stored in files.load_many(list(places)):
            upload.copy(places[name], stored)


def _copy(files: TensorFiles, places: dict[str, torch.Tensor]) -> None:
    for name, stored in files.load_many(list(places)):
        places[name].copy_(stored)
