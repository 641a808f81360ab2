"""Count the work of quantizing a model: a pure formula of its shape, the options and how its text is written.

Counted are matrix products, and beside them what costs as much: attention while the model writes its text, what is done
with each logit, and the launches of many small operations. Letters: in and out a layer's sizes.
"""

from dataclasses import dataclass

from quasar_core.config import QuantizeConfig
from quasar_core.draft.successors import width_of
from quasar_core.quantize.calibration import GREEDY_LENGTH, held_out_rows
from quasar_core.quantize.layer_plan import HEAD
from quasar_core.quantize.plan import Shape, block_of
from quasar_core.quantize.successors import MOST_READ
from quasar_core.quantize.text_plan import TextPlan

# Layers that read what another one reads: Hessian and factor are the other's.
SHARED = ("k_proj", "v_proj", "up_proj", "in_proj_z", "w3")
INTO_STREAM = ("o_proj", "out_proj", "down_proj", "w2", "output_linear")
# The solver's work on a layer, in products [in, in] × [in, out]; and its scale search, in multiply-adds a weight.
SOLVER_PRODUCTS, SEARCH_OPERATIONS = 8, 400
# As measured on SmolLM2: in multiply-adds of a product, a key or value that a single token attends to; in launches of
# the smallest operation, a block's step.
ATTENTION_COST, LAUNCHES = 6, 400
# Of passes and steps, with what is no product: norms, activations, copies, a fifth of the time.
BESIDE_PRODUCTS = 1.25
# In softmaxes of as many logits: a draw, a comparison of two models, and the search for the likeliest tokens.
DRAW_COST, COMPARE_COST, SUCCESSOR_COST = 2.5, 4, 1

KINDS = ("passes", "steps", "sums", "matrices", "logits")


@dataclass(frozen=True)
class Work:
    """Multiply-adds of passes over whole rows, of steps of a token a row, of sums over tokens, of float32 matrices.

    Then logits, counted in softmaxes, and launches.
    """

    passes: float
    steps: float
    sums: float
    matrices: float
    logits: float
    launches: float


@dataclass(frozen=True)
class Tokens:
    """How many tokens each part of the work sees: `counted` for their successors, of which `unread` by a pass.

    `compared` are those of fidelity, greedy text twice, `read` as often as a model reads one for that: greedy text by
    the target as well, whatever it has found while it wrote it. `written` are those that the target writes.
    """

    calibration: int
    written: int
    compared: int
    read: int
    counted: int
    unread: int


def count_tokens(shape: Shape, config: QuantizeConfig, text: TextPlan) -> Tokens:
    """Count for a model that writes its text as `text` plans: what it has written, it need not read."""
    length, held_out = config.calibration_length, held_out_rows(config)
    calibration, greedy, writes_all = config.texts * length, held_out * GREEDY_LENGTH, True
    compared, written = held_out * length + 2 * greedy, held_out * length + greedy + calibration
    if config.calibration != "self":
        writes_all, written = False, greedy
    remembered = held_out * length if text.remembers and writes_all else 0
    counted = min(calibration, MOST_READ) if width_of(shape.vocabulary) else 0
    unread = 0 if writes_all and text.by_target else counted
    return Tokens(calibration, written, compared, 2 * compared - greedy - remembered, counted, unread)


def count_work(shape: Shape, config: QuantizeConfig, rows: int, text: TextPlan) -> Work:
    """Count the work on a model that writes its `text` so many rows at a time; widths by layer are not counted."""
    length, blocks = config.calibration_length, {block_of(name) for name in shape.layers if name != HEAD}
    tokens, token, attention = count_tokens(shape, config, text), _token(shape), _attention(shape, length)
    turns = -(-held_out_rows(config) // rows) * GREEDY_LENGTH
    turns += -(-(config.texts + held_out_rows(config)) // rows) * length if config.calibration == "self" else 0
    logits = DRAW_COST * tokens.written + COMPARE_COST * tokens.compared + SUCCESSOR_COST * tokens.counted
    return Work(
        passes=sum(count_passes(shape, config, tokens)),
        steps=BESIDE_PRODUCTS * tokens.written * (token + _head(shape) + ATTENTION_COST * attention / 2),
        sums=sum(_sums(shape, name, tokens.calibration) for name in shape.layers),
        matrices=sum(_matrices(shape, name, config.reads_no_text) for name in shape.layers),
        logits=logits * shape.vocabulary,
        launches=turns * LAUNCHES * len(blocks),
    )


def count_passes(shape: Shape, config: QuantizeConfig, tokens: Tokens) -> tuple[float, float, float]:
    """Multiply-adds of passes over whole rows: of blocks that are quantized, of fidelity, of counting successors."""
    block = BESIDE_PRODUCTS * (_token(shape) + _attention(shape, config.calibration_length))
    fidelity = tokens.read * block + 2 * tokens.compared * _head(shape)
    return 2 * tokens.calibration * block, fidelity, tokens.unread * _head(shape)


def _token(shape: Shape) -> float:
    """Multiply-adds of a token in the layers of all blocks."""
    layers = ((name, size) for name, size in shape.layers.items() if name != HEAD)
    return sum(out * columns * _share(shape, name) for name, (out, columns) in layers)


def _attention(shape: Shape, length: int) -> float:
    """Multiply-adds of a token that attends to so many."""
    return 2 * length * sum(columns for name, (_, columns) in shape.layers.items() if name.endswith("o_proj"))


def _head(shape: Shape) -> int:
    return shape.vocabulary * shape.hidden


def _sums(shape: Shape, name: str, tokens: int) -> float:
    """Count a layer's Hessian and errors; where the input is shared, they are another layer's."""
    (out, columns), last = shape.layers[name], name.rpartition(".")[2]
    if last in SHARED:
        return 0
    errors = columns * out if last in INTO_STREAM else columns**2
    return tokens * _share(shape, name) * (columns**2 / 2 + errors)


def _matrices(shape: Shape, name: str, searches_alone: bool) -> float:
    """Count factor and solver of one layer; where the input is shared, the solver alone; or the search of scales."""
    out, columns = shape.layers[name]
    if searches_alone:
        return SEARCH_OPERATIONS * columns * out
    factor = 0 if name.rpartition(".")[2] in SHARED else columns**3 / 3
    return factor + SOLVER_PRODUCTS * columns**2 * out + SEARCH_OPERATIONS * columns * out


def _share(shape: Shape, name: str) -> float:
    """Return the share of the text that the layer reads."""
    return shape.routed if ".experts." in name else 1.0
