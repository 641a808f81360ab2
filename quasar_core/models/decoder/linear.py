"""The linear layers of a decoder as it multiplies them: those of one input fused, in 16 or 32 bits or on codes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from quasar_core.checkpoint.compressed_tensors import Float8Weight, PackedWeight, concatenate_float8
from quasar_core.checkpoint.gptq_format import QuantizedWeight, join_outputs
from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.errors import QuasarError
from quasar_core.kernels.linear import PackedLinear
from quasar_core.models.architectures.row import Mixture
from quasar_core.models.config.decoder import DecoderConfig
from quasar_core.models.config.recurrence import RecurrenceConfig
from quasar_core.models.decoder.layer import DenseLinear, FusedLinear, Linear
from quasar_core.records import Progress, no_progress


@dataclass(frozen=True)
class Product:
    """The stored layers that one product fuses, with the rows (outputs) of each; all have the same inputs."""

    names: tuple[str, ...]
    rows: tuple[int, ...]
    columns: int
    bias: bool
    routed: bool = False  # of an expert that tokens choose

    def part(self, index: int) -> "Product":
        """One of its layers alone."""
        return replace(self, names=(self.names[index],), rows=(self.rows[index],))


def block_products(config: DecoderConfig, index: int) -> dict[str, Product]:
    """The products of block `index`, by their field in `DecoderLayer`."""
    block = config.blocks[index]
    queries, states = config.num_heads * block.head_size, block.kv_heads * block.head_size
    hidden, product = config.hidden_size, partial(_product, index)
    names, attention = config.names, config.names.attention
    values = "k_proj" if block.values_are_keys else "v_proj"  # such rows stand twice: a few thousandths of a model
    read = f"{attention}.q_proj {attention}.k_proj {attention}.{values}"
    gated = 2 * queries if config.gates_attention else queries
    qkv = product(read, (gated, states, states), hidden, config.qkv_bias)
    if block.states_of != index:
        qkv = product(f"{attention}.q_proj", (queries,), hidden, config.qkv_bias)
    if "qkv" in config.fused:
        qkv = product(f"{attention}.qkv_proj", (queries + 2 * states,), hidden, config.qkv_bias)
    products = {"qkv": qkv, "out": product(f"{attention}.{names.out}", (hidden,), queries, config.out_bias)}
    if names.mix_gate:
        products["mix_gate"] = product(f"{attention}.{names.mix_gate}", (queries,), hidden, False)
    if block.recurrence is not None:
        products = recurrent_products(block.recurrence, f"model.layers.{index}.{config.recurrent_module}", hidden)
    if block.sparse and not has_both(config):
        return products
    products |= dict(zip(("gate_up", "down"), mlp_products(config, index, block.inner), strict=True))
    if config.inputs_size:
        products["input_gate"] = product("per_layer_input_gate", (config.inputs_size,), hidden, False)
        products["input_out"] = product("per_layer_projection", (hidden,), config.inputs_size, False)
    return products


def mlp_products(config: DecoderConfig, index: int, inner: int) -> tuple[Product, Product]:
    """The products of a block's MLP: gates and what they gate, and down."""
    hidden, names, mlp, product = config.hidden_size, config.names, config.names.mlp, partial(_product, index)
    up = product(f"{mlp}.{names.gate} {mlp}.{names.up}", (inner, inner), hidden, config.mlp_bias)
    if "gate_up" in config.fused:
        up = product(f"{mlp}.{names.gate_up}", (2 * inner,), hidden, config.mlp_bias)
    elif not config.gated:
        up = product(f"{mlp}.{names.up}", (inner,), hidden, config.mlp_bias)
    return up, product(f"{mlp}.{names.down}", (hidden,), inner, config.mlp_bias)


def _product(index: int, names: str, rows: tuple[int, ...], columns: int, bias: bool) -> Product:
    """A product of block `index`, its names in the block apart by spaces."""
    return Product(tuple(f"model.layers.{index}.{name}" for name in names.split()), rows, columns, bias)


def recurrent_products(shape: RecurrenceConfig, prefix: str, hidden: int) -> dict[str, Product]:
    """The products of a recurrent layer, by their field in `DecoderLayer`."""
    heads, values = shape.value_heads, shape.values
    out = Product((f"{prefix}.out_proj",), (hidden,), values, shape.bias)
    if shape.kind == "delta":
        read = Product((f"{prefix}.in_proj_qkv", f"{prefix}.in_proj_z"), (shape.channels, values), hidden, False)
        rates = Product((f"{prefix}.in_proj_b", f"{prefix}.in_proj_a"), (heads, heads), hidden, False)
        return {"qkv": read, "rates": rates, "out": out}
    rows = 3 * values if shape.kind == "conv" else values + shape.channels + heads
    return {"qkv": Product((f"{prefix}.in_proj",), (rows,), hidden, shape.bias), "out": out}


def recurrent_shapes(config: DecoderConfig, index: int) -> dict[str, tuple[int, ...]]:
    """The weights of a recurrent layer beside its products, by their names in the files."""
    shape = config.blocks[index].recurrence
    if shape is None:
        return {}
    prefix = f"model.layers.{index}.{config.recurrent_module}"
    conv = f"{prefix}.conv" if shape.kind == "conv" else f"{prefix}.conv1d"
    found: dict[str, tuple[int, ...]] = {f"{conv}.weight": (shape.channels, 1, shape.taps)}
    if shape.conv_bias:
        found[f"{conv}.bias"] = (shape.channels,)
    if shape.kind != "conv":
        found |= dict.fromkeys((f"{prefix}.A_log", f"{prefix}.dt_bias"), (shape.value_heads,))
        found[f"{prefix}.norm.weight"] = (shape.value_size if shape.kind == "delta" else shape.values,)
    if shape.kind == "mamba":
        found[f"{prefix}.D"] = (shape.value_heads,)
    return found


@dataclass(frozen=True)
class MixtureProducts:
    """A sparse block's products; of each expert two, the one of every token last."""

    router: Product
    gate_up: tuple[Product, ...]
    down: tuple[Product, ...]
    shared_gate: Product | None

    @property
    def of_experts(self) -> tuple[Product, ...]:
        """The products that may be quantized."""
        return (*self.gate_up, *self.down)


def mixture_products(config: DecoderConfig, index: int) -> MixtureProducts | None:
    """The products of a block's mixture; None where it has an MLP."""
    mixture, hidden = config.mixture, config.hidden_size
    if mixture is None or not config.blocks[index].sparse:
        return None
    module, row = mixture_module(config, index), mixture.row

    def expert(name: str, parts: tuple[str, str, str], inner: int, routed: bool) -> tuple[Product, Product]:
        gate, up, down = (f"{module}{name}.{part}" for part in parts)
        both = Product((gate, up), (inner, inner), hidden, bias=False, routed=routed)
        return both, Product((down,), (hidden,), inner, bias=False, routed=routed)

    experts = [expert(f"experts.{i}", row.parts, mixture.inner, routed=True) for i in range(mixture.count)]
    if mixture.shared_inner and row.shared_mlp:
        experts.append(mlp_products(config, index, mixture.shared_inner))
    elif mixture.shared_inner:
        experts.append(expert(row.shared, Mixture.parts, mixture.shared_inner, routed=False))
    gate = row.shared_gate
    return MixtureProducts(
        router=Product((f"{module}{row.router}",), (mixture.count,), hidden, bias=False),
        gate_up=tuple(gate_up for gate_up, _ in experts),
        down=tuple(down for _, down in experts),
        shared_gate=Product((f"{module}{gate}",), (1,), hidden, bias=False) if gate else None,
    )


def mixture_module(config: DecoderConfig, index: int) -> str:
    """What the names of a block's mixture begin with."""
    assert config.mixture is not None
    module = config.mixture.row.module
    return f"model.layers.{index}.{module}." if module else f"model.layers.{index}."


def has_both(config: DecoderConfig) -> bool:
    """Whether sparse blocks have an MLP too, beside their experts."""
    return config.mixture is not None and config.mixture.row.beside is not None


def beside_shapes(config: DecoderConfig, index: int) -> dict[str, tuple[int]]:
    """The norms and factors of a block's experts that stand beside an MLP, by their names in the files."""
    mixture = config.mixture
    if mixture is None or mixture.row.beside is None or not config.blocks[index].sparse:
        return {}
    module, names = mixture_module(config, index), mixture.row.beside
    norms = [f"{name}.weight" for name in (names.mlp_out_norm, names.norm, names.out_norm)]
    shapes = {f"{module}{name}": (config.hidden_size,) for name in (*norms, names.router_scale)}
    return shapes | {f"{module}{names.factors}": (mixture.count,)}


def router_correction(config: DecoderConfig, index: int) -> str | None:
    """The stored numbers that are added to scores where experts are chosen, if any."""
    if config.mixture is None or not config.mixture.correction:
        return None
    return f"{mixture_module(config, index)}{config.mixture.correction}"


def inputs_product(config: DecoderConfig) -> Product:
    """The projection of the embedding to the inputs of all blocks."""
    rows = config.num_layers * config.inputs_size
    return Product(("model.per_layer_model_projection",), (rows,), config.hidden_size, bias=False)


def head_product(config: DecoderConfig) -> Product:
    """The head as a product."""
    return Product(("lm_head",), (config.vocab_size,), config.hidden_size, bias=False)


Dense = Callable[[Product], Linear]  # a product, or a part of one, in 16 or 32 bits


def dense_only(product: Product, dense: Dense) -> Linear:
    """The target's way: nothing is packed."""
    return dense(product)


class Packing:
    """The verifier's way: products on a checkpoint's packed codes, and in 16 or 32 bits where it has none."""

    def __init__(
        self,
        checkpoint: VerifierCheckpoint,
        device: torch.device,
        dtype: torch.dtype,
        kernel: str,
        progress: Progress = no_progress,
    ) -> None:
        self.checkpoint, self.device, self.dtype, self.kernel = checkpoint, device, dtype, kernel
        self.progress = progress  # of measuring kernels
        self.names = frozenset(checkpoint.layer_names)

    def __call__(self, product: Product, dense: Dense) -> Linear:
        """A product, fused where its codes allow it."""
        packed = [name in self.names for name in product.names]
        if not any(packed):
            return dense(product)
        if all(packed):
            weights = [self._weight(product.part(index)) for index in range(len(packed))]
            if _agree(weights):
                place = self.device, self.dtype, self.kernel, self.progress
                return PackedLinear.build(concatenate(weights), self._bias(product), *place, routed=product.routed)
        return FusedLinear(tuple(self(product.part(index), dense) for index in range(len(packed))))

    def refuse_unknown(self, config: DecoderConfig) -> None:
        """Codes that no product takes are an error."""
        known = set(head_product(config).names).union(*(product.names for product in all_block_products(config)))
        unknown = sorted(self.names - known)
        if unknown:
            raise QuasarError(f"The target has no layer {unknown[0]}, which {self.checkpoint.folder} quantizes.")

    def norm(self, name: str, own: torch.Tensor, centred: bool) -> torch.Tensor:
        """A norm's weight: the checkpoint's where smoothing may have changed it, else the target's own."""
        if not self.checkpoint.own_norms or name not in self.checkpoint.tensors:
            return own
        return self.checkpoint.tensors.load(name).to(own) + int(centred)

    def _weight(self, part: Product) -> PackedWeight:
        (name,), (rows,) = part.names, part.rows
        weight = self.checkpoint.layer(name, self.device)
        shape = (weight.out_features, weight.in_features)
        if shape != (rows, part.columns):
            raise QuasarError(f"Layer {name} of {self.checkpoint.folder} is {shape}, and the target's is not.")
        return weight

    def _bias(self, product: Product) -> torch.Tensor | None:
        """The stored biases; some tools store zeros where the architecture has none."""
        names = [f"{part}.bias" for name in product.names for part in self.checkpoint.parts(name)]
        if not product.bias and not any(name in self.checkpoint.tensors for name in names):
            return None
        return torch.cat([self.checkpoint.tensors.load(name) for name in names]).to(self.device, self.dtype)


def concatenate(weights: Sequence[PackedWeight]) -> PackedWeight:
    """Layers of one input as one layer, output after output."""
    if len(weights) == 1:
        return weights[0]
    floats = [weight for weight in weights if isinstance(weight, Float8Weight)]
    if floats:
        return concatenate_float8(floats)
    return join_outputs([weight for weight in weights if isinstance(weight, QuantizedWeight)])


def _agree(weights: Sequence[PackedWeight]) -> bool:
    """Whether layers differ in nothing but their outputs."""
    layouts = {(type(weight), weight.bits, weight.group_size) for weight in weights}
    orders = [weight.g_idx for weight in weights if isinstance(weight, QuantizedWeight)]
    return len(layouts) == 1 and all(torch.equal(order, orders[0]) for order in orders)


def dense_rows(own: Linear, product: Product, part: Product) -> Linear:
    """The rows of a product in 16 or 32 bits that are a part of it; the product itself where the part is all of it."""
    if part == product:
        return own
    assert isinstance(own, DenseLinear)
    index = product.names.index(part.names[0])
    begin = sum(product.rows[:index])
    rows = slice(begin, begin + product.rows[index])
    return DenseLinear(own.weight[rows], None if own.bias is None else own.bias[rows])


def all_block_products(config: DecoderConfig) -> list[Product]:
    """The products of all blocks, in order; of a sparse block also those that are never quantized."""
    products: list[Product] = []
    for index in range(config.num_layers):
        products += block_products(config, index).values()
        mixture = mixture_products(config, index)
        if mixture is not None:
            products += [*mixture.of_experts, mixture.router, *filter(None, [mixture.shared_gate])]
    return products


def stored_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a model of this config stores."""
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        f"model.{config.names.last_norm}.weight": (hidden,),
    }
    for product in [*all_block_products(config), *([] if config.tied else [head_product(config)])]:
        for name, rows in zip(product.names, product.rows, strict=True):
            shapes[f"{name}.weight"] = (rows, product.columns)
            if product.bias:
                shapes[f"{name}.bias"] = (rows,)
    if config.inputs_size:
        size = config.num_layers * config.inputs_size
        shapes["model.embed_tokens_per_layer.weight"] = (config.inputs_vocab, size)
        shapes["model.per_layer_model_projection.weight"] = (size, hidden)
        shapes["model.per_layer_projection_norm.weight"] = (config.inputs_size,)
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}"
        if config.blocks_are_scaled:
            shapes[f"{prefix}.layer_scalar"] = (1,)
        if config.inputs_size:
            shapes[f"{prefix}.post_per_layer_input_norm.weight"] = (hidden,)
        shapes |= {f"{prefix}.{name}.weight": (hidden,) for name in config.norms.names}
        shapes |= head_norm_shapes(config, index)
        shapes |= recurrent_shapes(config, index)
        shapes |= beside_shapes(config, index)
        correction = router_correction(config, index)
        if correction and config.blocks[index].sparse:
            shapes[correction] = (config.mixture.count,) if config.mixture else ()
        if config.activation == "xielu":
            shapes |= dict.fromkeys(xielu_names(index), (1,))
    return shapes


def head_norm_shapes(config: DecoderConfig, index: int) -> dict[str, tuple[int]]:
    """The stored norms of a block's queries and keys."""
    if config.head_norms is None or not config.head_norms.weighted or config.blocks[index].recurrence is not None:
        return {}
    block, whole = config.blocks[index], config.head_norms.whole_rows
    kinds = 2 if block.states_of == index else 1
    prefix = f"model.layers.{index}.{config.names.attention}"
    heads = (config.num_heads, block.kv_heads)[:kinds] if whole else (1, 1)[:kinds]
    names = [f"{prefix}.{name}.weight" for name in config.head_norms.names[:kinds]]
    return {name: (count * block.head_size,) for name, count in zip(names, heads, strict=True)}


def xielu_names(index: int) -> list[str]:
    """The numbers of a block's xIELU in the files."""
    return [f"model.layers.{index}.mlp.act_fn.{name}" for name in ("alpha_p", "alpha_n", "beta", "eps")]
