"""The verifier's head, rounded to 8 bits when it is loaded: how near, where, and that the model's own text stays."""

from pathlib import Path

import pytest
import torch
from helpers.decoder_cases import CPU, FLOAT, in_passes, random_tokens, relative_error, save_model
from helpers.quantized_decoder import quantize_layers

from quasar_core.kernels.base import LayerShape
from quasar_core.kernels.cpu.vnni import VnniKernel
from quasar_core.kernels.linear import PackedLinear
from quasar_core.kernels.select import DENSE, KernelChoice
from quasar_core.models.decoder.layer import DenseLinear
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.weights import verifier_head
from quasar_core.models.weights.lean_weights import attach_verifier, load_target, load_verifier_alone
from quasar_core.models.weights.verifier_head import round_head, rounded
from quasar_core.records import no_progress


@pytest.mark.parametrize("group", [16, 64])
def test_each_value_is_off_by_half_a_step_of_its_group_at_most(group: int) -> None:
    weight = torch.randn(70, 128, generator=torch.Generator().manual_seed(0))
    weight[3], weight[4, :group] = 0, 1e-9
    found = rounded(weight, group)
    largest = weight.view(70, -1, group).abs().amax(-1, keepdim=True)
    # float16 holds a scale to 2^-11 of itself, so the largest value to half a step more
    steps = (largest / 127).expand(70, -1, group).reshape(70, 128)
    assert ((found.dequantize() - weight).abs() <= 0.57 * steps + 2**-24).all()
    assert found.has_trivial_groups
    assert found.is_symmetric


def test_rows_are_rounded_alike_however_many_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(70, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole = rounded(weight, 32)
    monkeypatch.setattr(verifier_head, "_ROWS", 9)
    for part, other in zip(vars(rounded(weight, 32)).values(), vars(whole).values(), strict=True):
        assert part == other if isinstance(part, int) else torch.equal(part, other)


def verifiers(folder: Path, kernel: str) -> tuple[LeanDecoder, list[LeanDecoder]]:
    """A target whose head is its embedding, and its verifier over it and alone."""
    save_model(folder / "target", "Llama", {"tie_word_embeddings": True})
    checkpoint = quantize_layers(folder / "target", folder / "verifier", lambda name: 4)
    target = load_target(folder / "target", CPU, FLOAT)
    return target, [attach_verifier(target, checkpoint, kernel), load_verifier_alone(checkpoint, CPU, FLOAT, kernel)]


@pytest.mark.usefixtures("cpp_pass")
def test_a_large_head_is_rounded_where_whole_passes_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, both = verifiers(tmp_path, "vnni")
    monkeypatch.setattr(verifier_head, "SMALLEST", target.head.weight.numel())
    for verifier in both:
        whole = in_passes(verifier, random_tokens(), [12, 1, 4])
        round_head(verifier)
        assert isinstance(verifier.head, PackedLinear)
        assert verifier.head.choice.reason == "as the head of 32 bits is rounded to 8 at load"
        assert 0 < relative_error(in_passes(verifier, random_tokens(), [12, 1, 4]), whole) < 0.02
    assert isinstance(target.head, DenseLinear)


@pytest.mark.parametrize(("kernel", "more"), [("vnni", 1), ("dense", 0)])
@pytest.mark.usefixtures("cpp_pass")
def test_a_small_head_or_one_beside_another_kernel_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: str, more: int
) -> None:
    target, both = verifiers(tmp_path, kernel)
    monkeypatch.setattr(verifier_head, "SMALLEST", target.head.weight.numel() + more)
    for verifier in both:
        stays = "head: it stays in 32 bits, as the other products run on dense, and it on vnni"
        assert round_head(verifier) == (stays if kernel == "dense" else None)
        assert isinstance(verifier.head, DenseLinear)


@pytest.mark.parametrize(("kernel", "found"), [("vnni", "vnni"), ("vnni", "dense"), ("dense", "vnni")])
@pytest.mark.usefixtures("cpp_pass")
def test_on_a_gpu_the_fastest_kernel_of_its_shape_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: str, found: str
) -> None:
    """As a GPU chooses, on a CPU: where dense is the fastest or takes the other products, the head stays."""
    target, both = verifiers(tmp_path, kernel)
    monkeypatch.setattr(verifier_head, "SMALLEST", target.head.weight.numel())
    asked = list[LayerShape]()

    def select(shape: LayerShape, *_: object, **more: object) -> KernelChoice:
        asked.append(shape)
        return KernelChoice(VnniKernel() if found == "vnni" else DENSE, "fastest of 2: 3 µs")

    monkeypatch.setattr(verifier_head, "select_kernel", select)
    monkeypatch.setattr(
        verifier_head, "_of_whole_passes", lambda *given: verifier_head._fastest(*given, progress=no_progress)
    )
    for verifier in both:
        whole = in_passes(verifier, random_tokens(), [12, 1, 4])
        note = round_head(verifier)
        if kernel == found:
            assert asked[-1] == LayerShape(64, len(target.head.weight), 8, 64, trivial_groups=True)
            assert note is None
            reason = "as the head of 32 bits is rounded to 8 at load; fastest of 2: 3 µs"
            assert verifier.head.choice.reason == reason  # type: ignore[attr-defined]
            assert 0 < relative_error(in_passes(verifier, random_tokens(), [12, 1, 4]), whole) < 0.02
        else:
            why = "no kernel for 8 bits is faster (fastest of 2: 3 µs)"
            why = "the other products are dequantized" if kernel == "dense" else why
            assert note == f"head: it stays in 32 bits, as {why}"
            assert isinstance(verifier.head, DenseLinear)
