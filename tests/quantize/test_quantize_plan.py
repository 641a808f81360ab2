"""The plan of a quantization against what it then writes and holds; what it refuses; the figures in the docs."""

import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.packed_weights import make_weight
from helpers.quantize_cases import CONFIG, quantize
from helpers.tiny_model import save_tiny_model
from transformers import AutoConfig, Qwen3Config, Qwen3ForCausalLM

from quasar_cli.console import show
from quasar_cli.main import run
from quasar_cli.render.quantize import plan_table, rounded_facts
from quasar_core import system
from quasar_core.api import quantizing
from quasar_core.config import QuantizeConfig
from quasar_core.errors import QuasarError
from quasar_core.models.config.shapes import shape_named
from quasar_core.models.hf.skeleton import build_skeleton
from quasar_core.quantize import estimate
from quasar_core.quantize.blocks import layerwise
from quasar_core.quantize.calibration import GREEDY_LENGTH
from quasar_core.quantize.estimate import shape_of
from quasar_core.quantize.plan import (
    Shape,
    activation_bytes,
    found_bytes,
    host_stages,
    make_plan,
    packed_bytes,
    refuse_what_cannot_fit,
)
from quasar_core.quantize.text_plan import NO_ROOM, Free, TextPlan, choose_text

pytest_plugins = ["helpers.quantize_fixtures"]
DOCS = Path(__file__).parents[2] / "docs" / "quantizing.md"
SMALL = Shape({"model.layers.0.up": (64, 32), "model.layers.1.up": (64, 32)}, 1000, 800, 32, 100)


@pytest.mark.parametrize("changes", [{}, {"bits": 8, "group_size": -1}, {"bits": 3, "lm_head_bits": 8}], ids=str)
def test_the_checkpoint_is_as_large_as_planned(source: Path, changes: dict[str, Any]) -> None:
    config = replace(CONFIG, **changes)
    plan = quantizing.estimate(str(source), config, device="cpu")
    report = quantize(source, config)
    header = 25_000  # names and offsets of some tens of tensors
    assert plan.checkpoint <= report.bytes_after <= plan.checkpoint + header
    assert plan.bits_per_weight == report.bits_per_weight


def test_packed_bytes_of_a_layer() -> None:
    """Those of the tensors that a layer is packed into."""
    for out, columns, bits, group_size in ((64, 128, 4, 32), (64, 100, 8, -1), (32, 96, 3, 64), (16, 160, 2, 128)):
        tensors = make_weight(bits, columns, out, group_size).pack().values()
        assert packed_bytes(out, columns, bits, group_size) == sum(tensor.nbytes for tensor in tensors)


def test_memory_does_not_grow_with_the_layers_and_disk_does() -> None:
    more = replace(SMALL, layers={f"model.layers.{i}.up": (64, 32) for i in range(8)})
    few, many = make_plan(SMALL, CONFIG), make_plan(more, CONFIG)
    assert (many.host, many.device) == (few.host, 0)
    assert many.disk > few.disk
    assert many.checkpoint > few.checkpoint


def test_smoothing_holds_a_block_in_float32_too() -> None:
    eight = replace(CONFIG, bits=8, group_size=-1)
    plain, smoothed = (make_plan(SMALL, replace(eight, method=method), True) for method in ("gptq", "w8a8"))
    assert smoothed.device - plain.device == (4 + 2) * 64 * 32


def test_hidden_states_are_spilled_beyond_max_memory() -> None:
    states = activation_bytes(SMALL, CONFIG)
    kept, spilled = (make_plan(SMALL, CONFIG, max_memory=limit) for limit in (states, states - 1))
    assert (kept.spilled, spilled.spilled) == (False, True)
    assert spilled.disk - kept.disk == states


def test_a_model_that_is_converted_or_loaded_whole_is_held_whole() -> None:
    large = replace(SMALL, other_weights=10**9)
    mapped = make_plan(large, CONFIG).host
    assert make_plan(replace(large, element=4), CONFIG).host - mapped > 3 * 10**9
    assert make_plan(replace(large, whole_because="it says so"), CONFIG).host - mapped > 10**9


def test_a_gpu_writes_the_text_where_it_holds_the_model() -> None:
    large = replace(SMALL, other_weights=10**10, ends_weights=10**9)
    roomy, tight = (make_plan(large, CONFIG, True, free_device=gb * 10**9) for gb in (80, 8))
    assert (roomy.text.on_device, tight.text.on_device) == (True, False)
    assert roomy.device > 2 * 10**10 > tight.device


GB = 10**9


@pytest.mark.parametrize(
    ("why", "passes", "free", "fast", "expected"),
    [
        (None, torch.bfloat16, Free(8 * GB), True, TextPlan(False, None, "bfloat16", 2 * GB, 6 * GB // 4)),
        (None, torch.bfloat16, Free(9 * GB), False, TextPlan(False, None, "float32", 4 * GB, 5 * GB // 4)),
        (None, torch.float16, Free(8 * GB), True, TextPlan(False, None, "bfloat16", 2 * GB, 6 * GB // 4)),
        (None, torch.float32, Free(9 * GB, None, 4 * GB), True, TextPlan(False, None, "float32", 4 * GB, GB)),
        (None, torch.bfloat16, Free(3 * GB), True, TextPlan(False, NO_ROOM, "bfloat16", 0, 3 * GB // 4)),
        ("so", torch.bfloat16, Free(8 * GB), False, TextPlan(False, "so", "bfloat16", 0, 2 * GB)),
        (None, torch.bfloat16, Free(8 * GB, 6 * GB), False, TextPlan(True, None, "bfloat16", 2 * GB, GB)),
        (None, torch.bfloat16, Free(8 * GB, 3 * GB), True, TextPlan(False, None, "bfloat16", 2 * GB, 6 * GB // 4)),
    ],
    ids=str,
)
def test_what_writes_the_text_is_chosen_by_what_is_free(
    why: str | None, passes: torch.dtype, free: Free, fast: bool, expected: TextPlan
) -> None:
    """Of a model of 10⁹ weights."""
    assert choose_text(10**9, passes, why, free, fast) == expected


def test_the_rows_of_the_lean_decoder_and_its_weights_are_planned(source: Path) -> None:
    """In the dtype that it has, and on the disk as they are kept."""
    shape = replace(SMALL, token=40)
    plans = [
        make_plan(shape, CONFIG, text=TextPlan(False, None, dtype, 10**9, 10**9)) for dtype in ("bfloat16", "float32")
    ]
    (two, four), rows = plans, CONFIG.samples + 3
    assert two.text_rows == four.text_rows == rows
    remembered = 3 * CONFIG.seq_len * shape.hidden  # of the rows that are held out
    assert four.host - two.host == rows * 40 * CONFIG.seq_len + 2 * remembered
    assert two.host > 10**9
    assert quantizing.estimate(str(source), CONFIG, device="cpu").text.why_not_lean is None


def test_what_the_target_finds_while_it_writes_by_hand() -> None:
    """Eight likely tokens of 12 bytes behind each token of the samples; hidden states of the rows that are held out."""
    text = TextPlan(False, None, "bfloat16", 0, 0)
    likeliest = 12 * 8 * CONFIG.texts * CONFIG.seq_len
    hidden = 2 * 32 * CONFIG.fidelity_rows * CONFIG.seq_len
    assert found_bytes(SMALL, CONFIG, text) == likeliest + hidden
    assert found_bytes(SMALL, CONFIG, replace(text, copy_bits=8)) == 0


def test_beside_a_gpu_fidelity_takes_the_weights_that_are_held_and_two_models_hidden_states() -> None:
    text, whole = TextPlan(False, None, "bfloat16", 0, 0), replace(SMALL, whole_because="it says so")
    tokens = 2 * CONFIG.seq_len + 4 * GREEDY_LENGTH  # greedy text is read twice
    read = CONFIG.fidelity_rows * tokens * 32 * 2
    assert host_stages(SMALL, CONFIG, 0, True, text)[2] == read
    assert host_stages(whole, CONFIG, 0, True, text)[2] == 2 * whole.weights + read


def test_the_same_codes_whether_hidden_states_lie_in_memory_or_in_a_file(source: Path) -> None:
    inside = Path(quantize(source, output=source.parent / "inside").checkpoint)
    outside = Path(quantize(source, output=source.parent / "outside", max_memory=1).checkpoint)
    assert (inside / "model.safetensors").read_bytes() == (outside / "model.safetensors").read_bytes()
    assert not (outside / "activations").exists()


def layered(folder: Path, layers: int) -> Path:
    """A tiny model of so many layers."""
    save_tiny_model(folder)
    config = Qwen3Config.from_pretrained(folder)
    config.num_hidden_layers, config.layer_types, config.vocab_size = layers, None, 264
    Qwen3ForCausalLM(Qwen3Config(**config.to_dict())).save_pretrained(folder)
    return folder


def tensors_alive() -> list[torch.Tensor]:
    """What the garbage collector sees of them; those that oneDNN has laid out have no storage to look at."""
    gc.collect()
    found = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor) and not thing.is_meta]
    return [tensor for tensor in found if tensor.layout == torch.strided]


def bytes_of_tensors(others: list[torch.Tensor]) -> int:
    """Bytes of all tensors alive but others', each storage once; what is mapped from a weights' file is no memory."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    mapped = [line.split()[0].split("-") for line in lines if line.endswith(".safetensors")]
    spans = [(int(begin, 16), int(end, 16)) for begin, end in mapped]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors_alive()}
    for tensor in others:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    in_memory = (address for address in storages if not any(begin <= address < end for begin, end in spans))
    return sum(storages[address] for address in in_memory)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc here to tell mapped memory by")
@pytest.mark.usefixtures("small_texts")
def test_what_is_in_memory_does_not_grow_with_the_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors alive when a block is about to be committed: the same at the last of five blocks as at the first."""
    original, alive, others = layerwise.write_commit, [], tensors_alive()  # which stay, so that no address is taken

    def watch(*arguments: Any) -> None:
        alive.append(bytes_of_tensors(others))
        original(*arguments)

    monkeypatch.setattr(layerwise, "write_commit", watch)
    quantize(layered(tmp_path / "five", 5))
    assert len(alive) == 5
    assert alive[0] > 4 * 264 * 64, "the embedding at least"
    assert max(alive) < 1.02 * alive[0]


def test_a_dry_run_prints_the_plan_and_writes_nothing(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(source.parent.rglob("*"))
    assert run(["quantize", str(source), "--group-size", "32", "--device", "cpu", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["checkpoint"] > 0
    assert plan["free_disk"] > 0
    assert run(["quantize", str(source), "--group-size", "32", "--device", "cpu", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "disk at the most" in shown
    assert "free here" in shown
    assert sorted(source.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        ("free_disk", r"This needs \d\.\d MB of disk, and 0\.0 MB are free here: free some"),
        ("free_memory", r"This needs \d\.\d GB of memory, and 0\.0 MB are free here: use fewer --samples"),
    ],
)
def test_what_cannot_fit_is_refused(
    source: Path,
    function: str,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(estimate, function, lambda *_: 1000)
    with pytest.raises(QuasarError, match=sentence):
        quantize(source)
    assert not (source.parent / "tiny-gptq-4bit-g32.partial").exists()
    assert run(["quantize", str(source), "--group-size", "32", "--device", "cpu", "--dry-run"]) == 1
    shown = capsys.readouterr()
    assert "checkpoint" in shown.out, "the plan is shown before it is refused"
    assert "are free here" in shown.err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--calibration", "nowhere.txt"], "--calibration must be a file or one of"),
        (["--group-size", "48"], "--group-size must be"),
    ],
)
def test_a_dry_run_refuses_what_a_run_refuses_before_any_work(
    options: list[str], sentence: str, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["quantize", str(source), "--device", "cpu", "--dry-run", *options]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert sentence in " ".join(shown.err.split())


def test_a_spill_that_does_not_fit_may_be_made_smaller() -> None:
    plan = make_plan(SMALL, replace(CONFIG, samples=10**6), max_memory=1)
    with pytest.raises(QuasarError, match=r"GB of disk, .*free some, or name another --output or use fewer --samples"):
        refuse_what_cannot_fit(replace(plan, free_disk=10**9), None)


GROUP_FILES = {
    "0::/": {"memory.max": "3000000", "memory.current": "2000000", "memory.stat": "file 9\ninactive_file 400000\n"},
    "4:memory:/job/step": {
        "memory/job/memory.limit_in_bytes": "3000000",
        "memory/job/memory.usage_in_bytes": "2000000",
        "memory/job/memory.stat": "inactive_file 1\ntotal_inactive_file 400000\n",
    },
}


@pytest.mark.parametrize("line", GROUP_FILES)
def test_what_a_container_allows_is_all_that_is_free(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both versions of control groups, and from the group above, too; without a limit, what the machine has."""
    (tmp_path / "meminfo").write_text("MemTotal: 9000000 kB\nMemAvailable: 5000000 kB\n")
    (tmp_path / "cgroup").write_text(f"9:pids:/\n{line}\n")
    for attribute, name in (("MEMORY_INFO", "meminfo"), ("OWN_GROUPS", "cgroup"), ("GROUPS", "groups")):
        monkeypatch.setattr(system, attribute, tmp_path / name)
    assert system.free_memory() == 5_000_000 * 1024
    for name, content in GROUP_FILES[line].items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(content)
    assert system.free_memory() == 3_000_000 - 2_000_000 + 400_000
    (tmp_path / "groups" / next(iter(GROUP_FILES[line]))).write_text("max")
    if line.startswith("0"):
        assert system.free_memory() == 5_000_000 * 1024


def published_shape(name: str, config: QuantizeConfig) -> Shape:
    """The shape of that name in `models/config/shapes.py`, in 16 bits."""
    content = shape_named("--like", name)
    options = {key: value for key, value in content.items() if key not in ("model_type", "dtype")}
    return shape_of(build_skeleton(AutoConfig.for_model(content["model_type"], **options), torch.bfloat16), config)


def plan_row(name: str, label: str) -> str:
    """A row of the docs' table, in GB."""
    config = QuantizeConfig()
    shape = published_shape(name, config)
    cpu, gpu = make_plan(shape, config), make_plan(shape, config, True, free_device=0)
    cells = [2 * shape.weights, cpu.checkpoint, cpu.disk, cpu.activations, cpu.host, gpu.host, gpu.device]
    return f"| {label} | " + " | ".join(f"{cell / 1e9:.1f}" for cell in cells) + " |"


@pytest.mark.parametrize(
    ("name", "label"), [("qwen3-8b", "Qwen3-8B"), ("qwen3-32b", "Qwen3-32B"), ("llama3-70b", "Llama-3-70B")]
)
def test_the_docs_show_what_a_dry_run_says(name: str, label: str) -> None:
    assert plan_row(name, label) in DOCS.read_text()


def test_the_plan_as_it_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    plan = replace(make_plan(SMALL, CONFIG, True, max_memory=1, free_device=80 * 10**9), free_device=80 * 10**9)
    show(plan_table(replace(plan, whole_because="it runs code of its own")))
    shown = capsys.readouterr().out
    words = ("80.0 GB free here), on one GPU", "in a file", "on the GPU, which holds it as a whole", "code of its own")
    assert all(expected in shown for expected in words)
    show(plan_table(make_plan(SMALL, CONFIG)))
    shown = capsys.readouterr().out
    assert "GPU memory" not in shown
    assert "its calibration and its greedy text, on the CPU, by transformers in bfloat16, since" in shown
    text = TextPlan(False, None, "float32", weights=10**6, room=10**6)
    show(plan_table(make_plan(SMALL, CONFIG, text=text)))
    shown = capsys.readouterr().out
    assert "on the CPU, by quasar's own decoder in float32, 38 rows at once" in shown
    show(plan_table(make_plan(SMALL, replace(CONFIG, calibration="text.txt"))))
    shown = capsys.readouterr().out
    assert "its greedy text, on the CPU" in shown
    assert "--calibration" not in shown, "which was given"


def test_layers_that_were_rounded_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"model.layers.0.mlp.experts.{i}.up_proj" for i in range(5)]
    assert rounded_facts([], verbose=True) == []
    ((_, few),), ((_, all_of_them),) = rounded_facts(names, verbose=False), rounded_facts(names, verbose=True)
    assert few == f"5 layers of experts that read too little text: {', '.join(names[:3])}, …"
    assert names[4] in all_of_them
