"""The predictions that are written down are those of the counts."""

from pathlib import Path

from quasar_core.models.config.decoder import DecoderConfig
from quasar_core.models.config.shapes import shape_named
from tools.predict_gpu import CODES, EIGHT, GPUS, page

PAGE = Path(__file__).parents[2] / "docs" / "results" / "gpu-predictions.md"


def test_the_page_holds_what_the_tool_predicts() -> None:
    config = DecoderConfig.parse({**shape_named("--shape", "qwen3-8b"), "dtype": "bfloat16"})
    assert PAGE.read_text().splitlines() == list(page(config, "qwen3-8b"))


def test_four_programs_of_packed_codes_share_a_multiprocessor() -> None:
    assert {kinds[gpu.capability].programs(gpu) for gpu in GPUS for kinds in (CODES, EIGHT)} == {4}
