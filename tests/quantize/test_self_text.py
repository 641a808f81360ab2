"""Text that a model writes for its own calibration: turns off the template, forced tokens, seeds, greedy parts."""

from pathlib import Path

import pytest
import torch
from helpers.chat_text import ASSISTANT, BEGIN, CHATML, END, NEWLINE, SYSTEM, USER, chat_tokenizer
from helpers.decoder_cases import CPU, save_model
from helpers.near_ties import assert_same_but_for_ties
from helpers.tiny_models import random_model, words
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from quasar_core.models.weights.lean_weights import load_target
from quasar_core.quantize.conversation import text_opening, turn_tokens
from quasar_core.quantize.logit_rows import draw
from quasar_core.quantize.self_text import write_self_text
from quasar_core.quantize.text_batch import Asked
from quasar_core.quantize.text_writers import LeanWriter, TransformersWriter, Writer, batch_rows

WITH_SYSTEM = "{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\nw50<|im_end|>\n' }}{%- endif %}" + CHATML


class ScriptedModel(torch.nn.Module):
    """Says `w90`, and ends every turn after `turn_length` of its own tokens since the last mark."""

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, turn_length: int) -> None:
        super().__init__()
        self.config = random_model("qwen3").model.config
        self.turn_length = turn_length
        self.said: list[list[int]] = []

    def forward(self, input_ids: torch.Tensor, past_key_values: object, **_: object) -> object:
        assert input_ids.shape[1] == 1, "of several tokens, the head is copied for every row"
        self.said = [
            before + row for before, row in zip(self.said or [[]] * len(input_ids), input_ids.tolist(), strict=True)
        ]
        logits = torch.full((len(input_ids), 1, 97), -1e9)
        for row, tokens in enumerate(self.said):
            tail = tokens[-self.turn_length :]
            logits[row, 0, END if tail == [90] * self.turn_length else 90] = 0
        return type("Output", (), {"logits": logits})


def test_turns_are_read_off_a_template() -> None:
    turns = turn_tokens(chat_tokenizer(CHATML))
    assert turns.opening == [BEGIN, USER, NEWLINE]
    assert turns.after_user == [NEWLINE, BEGIN, ASSISTANT, NEWLINE]
    assert turns.after_assistant == [NEWLINE, BEGIN, USER, NEWLINE]
    assert turns.ends == {END}


def test_a_default_system_prompt_belongs_to_the_opening() -> None:
    turns = turn_tokens(chat_tokenizer(WITH_SYSTEM))
    assert turns.opening == [BEGIN, SYSTEM, NEWLINE, 50, END, NEWLINE, BEGIN, USER, NEWLINE]
    assert turns.after_assistant == [NEWLINE, BEGIN, USER, NEWLINE]


@pytest.mark.parametrize("template", [None, "{{ 'w7' }}"])
def test_no_turns_without_a_template_or_where_it_hides_the_messages(template: str | None) -> None:
    assert turn_tokens(chat_tokenizer(template)) is None


def test_the_templates_tokens_follow_where_a_turn_ends() -> None:
    """User: two words; the template opens the assistant's turn; two words; it opens the user's."""
    rows = write_self_text(TransformersWriter(ScriptedModel(2)), chat_tokenizer(CHATML), 2, 20, seed=0).tokens
    user = [BEGIN, USER, NEWLINE, 90, 90, END]
    assistant = [NEWLINE, BEGIN, ASSISTANT, NEWLINE, 90, 90, END]
    again = [NEWLINE, BEGIN, USER, NEWLINE, 90, 90, END]
    assert rows.tolist() == [user + assistant + again] * 2


def test_a_row_shorter_than_the_opening_is_the_openings_beginning() -> None:
    rows = write_self_text(TransformersWriter(ScriptedModel(2)), chat_tokenizer(WITH_SYSTEM), 2, 4, seed=0).tokens
    assert rows.tolist() == [[BEGIN, SYSTEM, NEWLINE, 50]] * 2


@pytest.mark.parametrize("lean", [True, False])
def test_seeds_reproduce_and_differ(lean: bool, tiny_llama: tuple[LeanWriter, TransformersWriter]) -> None:
    """Whatever the rows of a batch."""
    writer = tiny_llama[0] if lean else tiny_llama[1]
    first, again, other = (write_self_text(writer, words(), 7, 20, seed).tokens for seed in (5, 5, 6))
    assert first.shape == (7, 20)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len({tuple(row) for row in first.tolist()}) == 7
    writer.room = 3 * writer.row_bytes(20)
    assert torch.equal(write_self_text(writer, words(), 7, 20, 5).tokens, first)


@pytest.fixture
def tiny_llama(tmp_path: Path) -> tuple[LeanWriter, TransformersWriter]:
    """The same model, as either writes with it."""
    model = save_model(tmp_path, "Llama", {"vocab_size": 97})
    return LeanWriter(load_target(tmp_path, CPU, torch.float32)), TransformersWriter(model)


@pytest.mark.parametrize("template", [None, CHATML])
def test_the_lean_decoder_writes_what_transformers_writes(
    template: str | None, tiny_llama: tuple[LeanWriter, TransformersWriter]
) -> None:
    """In float32, of the same seed; a chat's forced tokens and a greedy end included."""
    tokenizer = chat_tokenizer(template) if template else words()
    lean, other = (write_self_text(writer, tokenizer, 6, 48, 2, greedy_from=30).tokens for writer in tiny_llama)
    assert torch.equal(lean, other)


@pytest.mark.parametrize(
    ("room", "rows", "expected"), [(0, 5, 1), (39, 5, 3), (50, 5, 5), (10**6, 160, 160), (10**6, 300, 150), (70, 8, 4)]
)
def test_batches_are_nearly_equal_and_fit(room: int, rows: int, expected: int) -> None:
    assert batch_rows(room, 10, rows) == expected


@pytest.mark.usefixtures("solver")
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), vocabulary=st.integers(1, 700), spread=st.sampled_from([0.1, 3.0, 30.0]))
def test_draws_have_the_frequencies_of_the_softmax(seed: int, vocabulary: int, spread: float) -> None:
    """Over chances in even steps, a token is drawn as often as its probability says, to a step on either side."""
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed)) * spread
    logits[torch.randperm(vocabulary, generator=torch.Generator().manual_seed(seed))[: vocabulary // 3]] = -torch.inf
    steps = 500
    chances = (torch.arange(steps, dtype=torch.double) + 0.5) / steps
    counts = draw(logits.expand(steps, -1), chances).bincount(minlength=vocabulary)
    assert len(counts) == vocabulary
    assert ((counts - steps * logits.double().softmax(-1)).abs() <= 1.001).all()


@pytest.mark.usefixtures("solver")
def test_a_chance_next_to_one_draws_a_token_that_is_possible() -> None:
    logits = torch.full((3, 300), -torch.inf)
    logits[0, 7], logits[1, 299], logits[2, [0, 260]] = 1.0, -80.0, torch.tensor([0.0, -30.0])
    assert draw(logits, torch.full((3,), 1 - 1e-16, dtype=torch.double)).tolist()[:2] == [7, 299]
    assert draw(logits, torch.ones(3, dtype=torch.double)).tolist() == [7, 299, 260]
    assert draw(logits, torch.zeros(3, dtype=torch.double)).tolist() == [7, 299, 0]


@pytest.mark.parametrize("counted", [0, 3, 7])
@torch.inference_mode()
def test_what_was_asked_of_the_passes_is_what_the_model_says(
    counted: int, tiny_llama: tuple[LeanWriter, TransformersWriter], tmp_path: Path
) -> None:
    """Whatever the batches: of the first rows the likeliest tokens, of the others what the last block leaves."""
    lean, other = tiny_llama
    lean.room = 3 * lean.row_bytes(20)  # rows at once
    text = write_self_text(lean, words(), 7, 20, 5, kept=tmp_path, asked=Asked(counted, 4, hidden=True))
    passed = other.model(input_ids=text.tokens, output_hidden_states=True)
    if counted:
        assert text.likeliest is not None
        expected, found = passed.logits[:counted].softmax(-1), text.likeliest
        torch.testing.assert_close(found.chances, expected.topk(4).values)
        torch.testing.assert_close(found.chances, expected.gather(-1, found.tokens))
    if counted < 7:
        assert text.hidden is not None
        normed = other.model.model.norm(text.hidden)
        torch.testing.assert_close(normed, passed.hidden_states[-1][counted:, :-1], rtol=1e-4, atol=1e-5)
    assert (text.likeliest is None, text.hidden is None) == (counted == 0, counted == 7)
    again = write_self_text(lean, words(), 7, 20, 5, kept=tmp_path, asked=Asked(counted, 4, hidden=True))
    assert again.hidden is text.hidden is None or torch.equal(again.hidden, text.hidden)


def test_what_transformers_leaves_behind_its_blocks_is_not_known(tiny_llama: tuple[Writer, Writer]) -> None:
    text = write_self_text(tiny_llama[1], words(), 2, 8, 5, asked=Asked(1, 4, hidden=True))
    assert text.hidden is None
    assert text.likeliest is not None


def test_a_base_model_starts_from_a_drawn_token_and_samples_its_own_distribution() -> None:
    """The mean log-likelihood of the sampled tokens is the model's negative entropy, within chance."""
    model = random_model("llama").model
    rows = write_self_text(TransformersWriter(model), words(), 64, 24, seed=0).tokens
    assert len(set(rows[:, 0].tolist())) > 20
    with torch.no_grad():
        log_p = model(input_ids=rows).logits[:, :-1].float().log_softmax(dim=-1)
    likelihood = log_p.gather(2, rows[:, 1:, None])[..., 0]
    entropy = -(log_p.exp() * log_p).sum(dim=-1)
    spread = likelihood.std().item() / likelihood.numel() ** 0.5
    assert abs((likelihood + entropy).mean().item()) < 6 * spread
    flatter = (log_p / 1.3).log_softmax(dim=-1)
    of_flatter = flatter.gather(2, rows[:, 1:, None])[..., 0] - (flatter.exp() * flatter).sum(dim=-1)
    assert of_flatter.mean().abs().item() > 6 * spread, "another temperature would show"


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3"])
def test_the_greedy_part_is_transformers_greedy_continuation(architecture: str) -> None:
    model = random_model(architecture).model
    rows = write_self_text(TransformersWriter(model), words(), 3, 40, seed=1, greedy_from=12).tokens
    for row in rows:
        prompt = row[None, :12]
        expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=28)
        assert_same_but_for_ties(model, row.tolist(), expected[0].tolist())


def test_progress_counts_tokens_to_the_end() -> None:
    seen: list[tuple[str, int, int]] = []
    write_self_text(
        TransformersWriter(random_model("llama").model),
        words(),
        2,
        6,
        0,
        progress=lambda *call: seen.append(call),
        stage="s",
    )
    assert seen == [("s", 2 * position, 12) for position in range(2, 7)]


@pytest.mark.parametrize(
    ("template", "expected"),
    [("w5 w6 $A", [5, 6]), ("w5 $A w6", [5]), ("$A w6", []), ("$A", [])],
    ids=["two", "an end too", "only an end", "none"],
)
def test_a_base_models_text_begins_as_its_tokenizer_begins_every_text(template: str, expected: list[int]) -> None:
    """Gemma's <bos>, without which it writes what it was never trained to write; a token at random only without one."""
    tokenizer = words()
    ids = [(word, int(word[1:])) for word in template.split() if word != "$A"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=ids)
    assert text_opening(tokenizer) == expected
    rows = write_self_text(TransformersWriter(random_model("llama").model), tokenizer, 64, 6, seed=0).tokens
    begin = len(expected)
    assert rows[:, :begin].tolist() == [expected] * 64
    assert len(set(rows[:, begin].tolist())) > 10
