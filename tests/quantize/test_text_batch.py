"""What a batch of written text remembers is what the model's blocks give, of every architecture of the lean decoder."""

from pathlib import Path

import pytest
import torch
from helpers.decoder_cases import CASES, CPU, recorded_cases, save_model
from helpers.default_share import some
from helpers.tiny_models import words

from quasar_core.models.weights.lean_weights import load_target
from quasar_core.quantize.blocks.streaming import open_target
from quasar_core.quantize.measure_fidelity import RowsRead, read_rows
from quasar_core.quantize.self_text import write_self_text
from quasar_core.quantize.text_batch import Asked
from quasar_core.quantize.text_writers import LeanWriter

ROWS, LENGTH = 3, 20


FIRST = {CASES[case][0]: case for case in reversed(recorded_cases())}  # of each family


@pytest.mark.parametrize("case", some(recorded_cases(), FIRST.values()))
def test_hidden_states_of_written_text_are_those_of_text_that_is_read(case: str, tmp_path: Path) -> None:
    save_model(tmp_path, *CASES[case])
    writer = LeanWriter(load_target(tmp_path, CPU, torch.float32))
    text = write_self_text(writer, words(), ROWS, LENGTH, seed=1, asked=Asked(hidden=True))
    assert text.hidden is not None
    target, rows = open_target(tmp_path, CPU, torch.float32), text.tokens[:, :-1]
    written, read = RowsRead(target.ends(), [(rows, text.hidden)]), read_rows(target, [rows], "reading")
    for row in rows.tolist():
        ours, theirs = (model.forward(row, model.new_cache(LENGTH)) for model in (written, read))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
