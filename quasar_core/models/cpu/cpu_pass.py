"""Run a decoder's short passes on the CPU: one call into C++ for all its blocks (`kernels/cpu/pass.h`).

PyTorch's operations cost a few microseconds each, and each reads its input from where another left it; a pass of a
0.6B model spends a third of its time between the products. Here a pass is one parallel region. A token's logits do
not depend on how many tokens pass beside it, to the last bit: so a text that is verified in windows is the one that
plain decoding writes, in bfloat16 too. Letters: T tokens of a pass, D head size, V vocabulary.
"""

import ctypes
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from quasar_core.kernels.cpu import forms, library
from quasar_core.kernels.cpu import library as cpp
from quasar_core.kernels.cpu.compressed import BITS, CompressedWeight
from quasar_core.kernels.cpu.vnni import VnniWeight
from quasar_core.kernels.linear import PackedLinear
from quasar_core.models.architectures.row import HeadNorms
from quasar_core.models.base import Choices, check_likeliest, depths_of, in_rows
from quasar_core.models.cpu.rotations import Tables
from quasar_core.models.decoder.cache import DecoderCache
from quasar_core.models.decoder.experts import Experts
from quasar_core.models.decoder.known_tokens import no_logits
from quasar_core.models.decoder.layer import (
    CompressedLinear,
    DecoderLayer,
    DenseLinear,
    FusedLinear,
    Joint,
    LayerInputs,
    Linear,
)
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.recurrent import compiled_rule
from quasar_core.models.recurrent.rules import Recurrence
from quasar_core.models.recurrent.states import Inputs, LayerStates, State
from quasar_core.models.rope import query_growth

ACTIVATIONS = ("silu", "gelu_tanh", "relu2", "xielu")  # in the order of `elementwise.h`
SCORES = ("softmax", "chosen", "sigmoid")  # in the order of `experts.h`
BESIDE = ("mlp_out_norm", "router_norm", "norm", "out_norm", "factors")  # of experts beside an MLP
BITS_OF = {torch.bfloat16: 16, torch.float32: 32}
KERNELS = frozenset({"vnni", "dense"})  # whose weights it reads as they prepared them
# Tokens up to which a prompt's pass takes no longer here than in PyTorch's operations: where bfloat16 is multiplied in
# pairs and PyTorch has no tiles (AMX) for it, and where it is multiplied in tiles here too. It is one number whether
# weights are compressed or not, as no bit of a text may depend on that. `tools/measure_prompts.py` measures both.
SHORT_PROMPT, TILED_PROMPT = 33, 256


def why_not(decoder: LeanDecoder) -> str | None:
    """Why the C++ pass does not run a decoder, or None where it does."""
    if decoder.dtype not in BITS_OF:
        return f"it takes bfloat16 and float32, not {str(decoder.dtype).removeprefix('torch.')}"
    config = decoder.config
    sizes = {config.hidden_size, *(size for block in config.blocks for size in (block.inner, block.head_size))}
    sizes |= {config.inputs_size, *((config.mixture.inner, config.mixture.shared_inner) if config.mixture else ())}
    if any(size % 16 for size in sizes):
        return "hidden, intermediate and head sizes must be multiples of 16"
    for block in config.blocks:
        if block.recurrence is not None and (reason := compiled_rule.why_not(block.recurrence)):
            return reason
    foreign = {layer.choice.kernel.name for layer in decoder.packed_layers} - KERNELS
    if foreign:
        return f"it runs packed products on vnni or dense, and this verifier has some on {', '.join(sorted(foreign))}"
    return cpp.why_not_here()


def longest_prompt(dtype: torch.dtype) -> int:
    """Tokens up to which the pass of a prompt runs in C++; 0 where that is not known to be as fast."""
    if dtype != torch.bfloat16 or not cpp.multiplies_bfloat16():
        return 0
    if cpp.multiplies_in_tiles():
        return TILED_PROMPT
    return 0 if "amx_bf16" in forms.instructions() else SHORT_PROMPT


def remark() -> str:
    """What is to be said of the C++ library beside that it runs, to be appended to a sentence."""
    return library.remark(cpp.SOURCE)


def describe_form() -> str:
    """The instruction set that passes run on, and why."""
    return cpp.describe_form()


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class RecurrentPass:
    """The states of recurrent layers in one pass: those in front of it, and memory for what it leaves of them."""

    def __init__(self, rules: Sequence[Recurrence | None], cache: DecoderCache, count: int) -> None:
        self._start = cache.length
        self._layers = list[tuple[LayerStates, Inputs, State, State]]()  # with the states before and behind
        self.places = (cpp.StatePlace * len(rules))()
        for index, (rule, states) in enumerate(zip(rules, cache.states, strict=True)):
            if rule is not None and states is not None:
                before = compiled_rule.contiguous(states.at(self._start, rule.advance))
                after = compiled_rule.empty_state(rule.shape, before.window.dtype)
                inputs = compiled_rule.empty_inputs(rule.shape, count, before.window.dtype)
                self.places[index] = compiled_rule.place_of(before, after, inputs)
                self._layers.append((states, inputs, before, after))

    def record(self) -> None:
        """Note what the pass has left, once it has ended."""
        for states, inputs, _, after in self._layers:
            states.record(self._start, [(inputs, after)])


def described(rule: Recurrence) -> cpp.Recurrence:
    """A rule's description, which it keeps itself."""
    assert rule.compiled is not None
    return rule.compiled.described


class CpuPass:
    """Implements `base.FastPass`. The decoder's tensors must stay where they are."""

    name = "C++"
    gives_rows = True
    longest, longest_tree = 320, 64  # a window of 256 tokens and a draft behind it are one pass

    def __init__(self, decoder: LeanDecoder) -> None:
        self.config = decoder.config
        self._kept: list[torch.Tensor] = []  # what the description points to
        self._compressed: list[CompressedWeight] = []  # likewise
        self._mixtures: list[cpp.Experts] = []
        self._is_bfloat16 = int(decoder.dtype == torch.bfloat16)
        self._knows_some = decoder.head_tokens is not None
        self._tables = [Tables(rope) for rope in decoder.ropes]
        self._rules = [layer.recurrence for layer in decoder.layers]
        self.longest_prompt = longest_prompt(decoder.dtype)
        self._run, self._source = cpp.library().quasar_pass_run, decoder.source
        self._pass = cpp.library().quasar_pass_new(ctypes.byref(self._describe(decoder)))
        weakref.finalize(self, cpp.library().quasar_pass_delete, self._pass, self._is_bfloat16)

    def run(
        self,
        tokens: Sequence[int],
        cache: DecoderCache,
        parents: Sequence[int] | None = None,
        last_only: bool = False,
    ) -> torch.Tensor:
        """One pass at position `cache.length`, which moves on by T → float32 logits [T, V], [1, V] with `last_only`."""
        size = 1 if last_only and cache.rows is None else len(tokens), self.config.vocab_size
        logits = no_logits(*size) if self._knows_some else torch.empty(*size)
        self.choose(tokens, cache, logits=logits, parents=parents)
        return logits[-1:] if last_only else logits

    def choose(
        self,
        tokens: Sequence[int],
        cache: DecoderCache,
        likeliest: int = 0,
        *,
        logits: torch.Tensor | None = None,
        parents: Sequence[int] | None = None,
    ) -> Choices:
        """One pass, as `run` → the choices of its rows; `logits` are written where given.

        Where logits are [R, V] they, and the choices, are of the last R rows; of all where the cache keeps rows. With
        `parents` the tokens are a tree: each stands behind its parent, and sees its own ancestors alone.
        """
        count = len(tokens)
        shown = count if logits is None else len(logits)
        self._check(tokens, likeliest)
        chosen, margins = (ctypes.c_int64 * shown)(), (ctypes.c_float * shown)()
        found = (ctypes.c_int32 * (shown * likeliest))()
        depths = None if parents is None else depths_of(parents)
        end = cache.length + (count if depths is None else max(depths) + 1)
        growth = self._growth(cache.length, end, depths)
        recurrent = RecurrentPass(self._rules, cache, count) if self.config.is_recurrent else None
        given = (
            (ctypes.c_int64 * count)(*tokens),
            None if parents is None else (ctypes.c_int * count)(*parents),
            count,
            shown,
            cache.length,
            *self._rotations(cache, end),
            _address(growth),
            cache.addresses,
            None if recurrent is None else recurrent.places,
            cache.capacity,
            _address(None if cache.given is None else cache.given[cache.length]),
            _address(None if cache.rows is None else cache.rows.place(cache.length, count)),
            _address(logits),
            chosen,
            margins,
            likeliest,
            found,
            torch.get_num_threads(),
        )
        for layers in self._source.stretches():
            self._run(self._pass, self._is_bfloat16, layers.start, layers.stop, *given)
        if recurrent is not None:
            recurrent.record()
        if cache.rows is not None:
            cache.rows.mark(cache.length, count)
        cache.advance(count)
        return Choices(chosen[:], margins[:], likeliest=in_rows(found[:], likeliest))

    def _check(self, tokens: Sequence[int], likeliest: int) -> None:
        """IndexError for tokens that the embedding has not: the C++ would read beyond it."""
        check_likeliest(likeliest)
        if not 0 <= min(tokens) <= max(tokens) < self.config.vocab_size:
            raise IndexError(f"a token of {tokens} is not in a vocabulary of {self.config.vocab_size}")

    def _rotations(self, cache: DecoderCache, end: int) -> Iterator[Any]:
        """The places of the pass's cosines, one for each rotary embedding, and those of its sines."""
        places = [tables.places(cache.length, end, cache.prompt_length) for tables in self._tables]
        return ((ctypes.c_void_p * len(places))(*some) for some in zip(*places, strict=True))

    def _growth(self, start: int, end: int, depths: Sequence[int] | None) -> torch.Tensor | None:
        """The factors [T] by which the queries of a pass grow, where they do."""
        growth = self.config.query_growth
        if growth is None:
            return None
        positions = torch.arange(start, end) if depths is None else start + torch.tensor(depths)
        return query_growth(positions, *growth).contiguous()

    def seconds(self) -> tuple[float, float]:
        """Seconds of all passes so far, and those of them in matrix products."""
        both = (ctypes.c_double * 2)()
        cpp.library().quasar_pass_seconds(self._pass, self._is_bfloat16, both)
        return both[0], both[1]

    def _describe(self, decoder: LeanDecoder) -> cpp.Model:
        layers = [self._layer(layer) for layer in decoder.layers]
        config, norms = self.config, self.config.head_norms or HeadNorms()
        return cpp.Model(
            hidden=config.hidden_size,
            heads=config.num_heads,
            layers=len(layers),
            is_bfloat16=self._is_bfloat16,
            activation=ACTIVATIONS.index(config.activation),
            gated=config.gated,
            norms_whole_rows=norms.whole_rows,
            norms_last=norms.after_rotation,
            interleaved=config.ropes[0].interleaved,
            gates_attention=1 if config.gates_attention else 2 * bool(config.names.mix_gate),  # `Gates` of `model.h`
            norms_embedding=config.norms_embedding,
            eps=config.eps,
            behind_eps=config.behind_eps,
            embedding_scale=decoder.embedding_scale,
            residual_scale=config.residual_scale,
            scores_scale=config.scores_scale or 0,
            scores_cap=config.scores_cap or 0,
            logits_scale=config.logits_scale,
            logits_cap=config.logits_cap or 0,
            embedding=self._address(decoder.embedding),
            norm=self._floats(decoder.norm),
            head=self._fused(decoder.head),
            head_tokens=None if decoder.head_tokens is None else self._address(decoder.head_tokens),
            vocabulary=config.vocab_size,
            norms_values=norms.of_values,
            **self._inputs(decoder.inputs),
            **self._joint(decoder.joint),
            layer=(cpp.Layer * len(layers))(*layers),
        )

    def _inputs(self, inputs: LayerInputs | None) -> dict[str, Any]:
        """The inputs that each block has of its own, by the fields of `Model`."""
        if inputs is None:
            return {}
        return {
            "inputs_size": self.config.inputs_size,
            "inputs_embedding": self._address(inputs.embedding),
            "inputs_projection": self._fused(inputs.projection),
            "inputs_norm": self._floats(inputs.norm),
            "inputs_scale": inputs.scale,
        }

    def _joint(self, joint: Joint | None) -> dict[str, Any]:
        """What stands before the block of a head that goes on from another model's rows, by the fields of `Model`."""
        if joint is None:
            return {}
        return {
            "joint": self._fused(joint.projection),
            "joint_embedding_norm": self._floats(joint.embedding_norm),
            "joint_rows_norm": self._floats(joint.rows_norm),
        }

    def _layer(self, layer: DecoderLayer) -> cpp.Layer:
        shape = layer.shape
        return cpp.Layer(
            input_norm=self._floats(layer.input_norm),
            out_norm=self._floats(layer.out_norm),
            mlp_norm=self._floats(layer.mlp_norm),
            down_norm=self._floats(layer.down_norm),
            head_norms=self._floats(layer.head_norms),
            activation=self._floats(layer.activation),
            qkv=self._fused(layer.qkv, layer.rates, layer.mix_gate),
            out=self._fused(layer.out),
            gate_up=self._fused(layer.gate_up),
            down=self._fused(layer.down),
            input_gate=self._fused(layer.input_gate),
            input_out=self._fused(layer.input_out),
            input_out_norm=self._floats(layer.input_out_norm),
            scalar=1 if layer.scalar is None else layer.scalar.item(),
            shares=layer.shares,
            window=shape.window or 0,
            sinks=shape.sinks,
            rope=-1 if shape.rope is None else shape.rope,
            channels=0 if shape.rope is None else self.config.ropes[shape.rope].channels,
            kv_heads=shape.kv_heads,
            head_size=shape.head_size,
            experts=None if layer.experts is None else ctypes.pointer(self._experts(layer.experts)),
            recurrence=None if layer.recurrence is None else ctypes.pointer(described(layer.recurrence)),
        )

    def _experts(self, experts: Experts) -> cpp.Experts:
        config, gate, beside = experts.config, experts.shared_gate, experts.beside
        router = [DenseLinear(experts.router), *([] if gate is None else [DenseLinear(gate)])]
        described = cpp.Experts(
            count=config.count,
            chosen=config.chosen,
            shared=bool(config.shared_inner),
            scores=SCORES.index(config.scores),
            normalised=config.normalised,
            scale=config.scale,
            added=config.row.added,
            router=self._fused(FusedLinear(tuple(router))),
            correction=self._floats(experts.correction),
            gate_up=(cpp.FusedWeight * config.experts)(*map(self._fused, experts.gate_up)),
            down=(cpp.FusedWeight * config.experts)(*map(self._fused, experts.down)),
            **{} if beside is None else {name: self._floats(getattr(beside, name)) for name in BESIDE},
        )
        self._mixtures.append(described)
        return described

    def _floats(self, weights: torch.Tensor | None) -> int | None:
        return None if weights is None else self._address(weights.float())

    def _fused(self, *products: Linear | None) -> cpp.FusedWeight:
        """Products of one input as one, those that there are."""
        some = [product for product in products if product is not None]
        if not some:
            return cpp.FusedWeight()
        linears = [part for one in some for part in (one.parts if isinstance(one, FusedLinear) else (one,))]
        parts = [self._product(linear) for linear in linears]
        return cpp.FusedWeight(
            parts=(cpp.Product * cpp.MOST_PARTS)(*parts),
            count=len(parts),
            inputs=parts[0].inputs,
            outputs=sum(part.outputs for part in parts),
        )

    def _product(self, linear: Linear) -> cpp.Product:
        assert isinstance(linear, PackedLinear | DenseLinear | CompressedLinear)
        bias = None if linear.bias is None else self._address(linear.bias.float())
        weight = linear.prepared if isinstance(linear, PackedLinear) else linear.weight
        if isinstance(weight, VnniWeight):
            stream = self._address(weight.stream)
            sizes = weight.in_features, weight.out_features, weight.groups, weight.group
            return cpp.Product(stream, bias, weight.bits, *sizes)
        if isinstance(weight, CompressedWeight):
            self._compressed.append(weight)
            sizes = weight.in_features, weight.out_features, 1, weight.in_features
            return cpp.Product(ctypes.addressof(weight.described), bias, BITS, *sizes)
        outputs, inputs = weight.shape
        return cpp.Product(self._address(weight), bias, BITS_OF[weight.dtype], inputs, outputs, 1, inputs)

    def _address(self, tensor: torch.Tensor) -> int:
        assert tensor.is_contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()
