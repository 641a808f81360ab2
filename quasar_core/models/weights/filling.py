"""Tensors that are allocated first, fused ones whole, and then filled from a model's files, so that none is held twice.

A stored tensor that has no place is refused, but for those without an effect.
"""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch

from quasar_core.checkpoint.tensor_files import TensorFiles
from quasar_core.errors import QuasarError
from quasar_core.kernels.cpu.compressed import CompressedWeight
from quasar_core.kernels.cpu.huge_pages import empty_in_huge_pages
from quasar_core.models.config.decoder import DecoderConfig
from quasar_core.models.decoder.activations import xielu_weights
from quasar_core.models.decoder.layer import CompressedLinear, DenseLinear
from quasar_core.models.decoder.linear import Product, xielu_names
from quasar_core.models.weights.streaming import StreamedWeights
from quasar_core.models.weights.upload import Upload
from quasar_core.records import Progress, no_progress
from quasar_core.store.text_part import BESIDE

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head"


def has_no_effect(name: str, config: DecoderConfig) -> bool:
    """Whether a stored tensor is a buffer that models compute from their config, or of a block that does not run.

    Older tools stored such buffers; some models have blocks behind the last one, or heads beside it (`mtp`), that only
    predict further tokens.
    """
    further = range(config.num_layers, config.num_layers + config.further_blocks)
    if name.startswith(BESIDE) or name.endswith("rotary_emb.inv_freq"):
        return True
    return any(name.startswith(f"model.layers.{index}.") for index in further)


class Filling:
    """Tensors that were allocated and wait for their content."""

    def __init__(
        self,
        files: TensorFiles,
        device: torch.device,
        dtype: torch.dtype,
        config: DecoderConfig,
        places: Mapping[tuple[str, ...], torch.Tensor | CompressedWeight] = MappingProxyType({}),
        renamed: tuple[tuple[str, str], ...] = (),
    ) -> None:
        self.files, self.device, self.dtype = files, device, dtype
        self._places = places  # of products whose weights are not filled here
        self._centred, self._last_is_centred = config.centred_norms, config.centred_last_norm
        self._renamed = (*(config.mixture.row.renamed if config.mixture else ()), *renamed)
        self._waiting: dict[str, list[torch.Tensor]] = {}  # its places
        self._norms: list[torch.Tensor] = []
        self._activations: list[torch.Tensor] = []

    def tensor(self, names: Sequence[str], rows: Sequence[int], *columns: int) -> torch.Tensor:
        """One tensor [sum of rows, *columns], whose rows are the stored tensors of these names, in order."""
        names = [self._stored(name) for name in names]
        for name, count in zip(names, rows, strict=True):
            self.files.check_shape(name, (count, *columns))  # before anything is allocated
        whole = self._empty(sum(rows), *columns)
        for name, place in zip(names, whole.split(list(rows)), strict=True):
            self._waiting.setdefault(name, []).append(place)
        return whole

    def vector(self, name: str, *shape: int) -> torch.Tensor:
        """A few numbers that a rule computes with, in float32."""
        self.files.check_shape(name, shape)
        whole = torch.empty(*shape, device=self.device)
        self._waiting[name] = [whole]
        return whole

    def taps(self, name: str, channels: int, count: int) -> torch.Tensor:
        """A convolution's weight [channels, 1, count] as [count, channels], in float32."""
        self.files.check_shape(name, (channels, 1, count))
        whole = torch.empty(count, channels, device=self.device)
        self._waiting[name] = [whole.T[:, None]]
        return whole

    def floats(self, name: str, size: int) -> torch.Tensor:
        """Stored numbers [size], in float32 whatever the weights are."""
        name = self._stored(name)
        self.files.check_shape(name, (size,))
        whole = torch.empty(size, device=self.device)
        self._waiting[name] = [whole]
        return whole

    def rows_of(self, products: Sequence[Product]) -> list[DenseLinear]:
        """Products of one shape in one tensor, each with its own rows."""
        names = [f"{name}.weight" for product in products for name in product.names]
        sizes = [rows for product in products for rows in product.rows]
        whole = self.tensor(names, sizes, products[0].columns)
        return [DenseLinear(weight) for weight in whole.view(len(products), -1, products[0].columns)]

    def _stored(self, name: str) -> str:
        """The name in the files, where another one may stand there: of transformers 5, or of a head's block."""
        other = name
        for part, later in self._renamed:
            other = other.replace(part, later)
        return other if name not in self.files and other in self.files else name

    def number(self, name: str) -> torch.Tensor:
        """One stored number [1]."""
        return self.tensor([name], [1])

    def norm(self, name: str, size: int) -> torch.Tensor:
        """A norm's weight [size]; centred ones become whole, in float32, as 1 + w has more bits than w."""
        name = self._stored(name)
        self.files.check_shape(name, (size,))
        return self._place_norm([name], [1], size)[0]

    def last_norm(self, name: str, size: int) -> torch.Tensor:
        """That of the norm before the head, which may be as it is where the others are centred."""
        is_plain = self._centred and not self._last_is_centred
        return self.tensor([name], [size]) if is_plain else self.norm(name, size)

    def ones(self, *shape: int) -> torch.Tensor:
        """The weights of norms that have none."""
        return torch.ones(*shape, device=self.device, dtype=self.dtype)

    def repeated_norms(self, names: Sequence[str], times: Sequence[int], size: int) -> torch.Tensor:
        """One tensor [sum of times, size]; a stored vector is of `size` and repeated, or as long as its rows."""
        names = [self._stored(name) for name in names]
        for name, count in zip(names, times, strict=True):
            if self.files.shape(name) != (count * size,):
                self.files.check_shape(name, (size,))
        return self._place_norm(names, times, size)

    def _place_norm(self, names: Sequence[str], times: Sequence[int], size: int) -> torch.Tensor:
        dtype = torch.float32 if self._centred else self.dtype
        whole = torch.empty(sum(times), size, device=self.device, dtype=dtype)
        for name, place in zip(names, whole.split(list(times)), strict=True):
            self._waiting[name] = [place if self.files.shape(name) == (size,) else place.view(-1)]
        self._norms.append(whole)
        return whole

    def xielu(self, index: int) -> torch.Tensor:
        """The weights of a block's activation, made of the stored ones when these are there."""
        names = xielu_names(index)
        whole = self._empty(len(names))
        for name, place in zip(names, whole.split(1), strict=True):
            shape = self.files.shape(name)  # of one element, in one dimension or in none
            place = place.view(shape) if math.prod(shape) == 1 else place
            self.files.check_shape(name, tuple(place.shape))
            self._waiting[name] = [place]
        self._activations.append(whole)
        return whole

    def linear(self, product: Product) -> DenseLinear:
        """A product in 16 or 32 bits."""
        weight = self._places.get(product.names)
        if weight is None:
            weight = self.tensor([f"{name}.weight" for name in product.names], product.rows, product.columns)
        assert isinstance(weight, torch.Tensor)
        return DenseLinear(weight, self._bias(product))

    def product(self, product: Product) -> DenseLinear | CompressedLinear:
        """A product of a block, in 12 bits where its place holds it so."""
        weight = self._places.get(product.names)
        if isinstance(weight, CompressedWeight):
            return CompressedLinear(weight, self._bias(product))
        return self.linear(product)

    def _bias(self, product: Product) -> torch.Tensor | None:
        names = [f"{name}.bias" for name in product.names]
        return self.tensor(names, product.rows) if product.bias else None

    def refuse_unknown(self, config: DecoderConfig, names: Sequence[str]) -> None:
        """A stored tensor that the architecture has no place for would be left out of the model: refuse it."""
        shared = {EMBEDDING, f"{HEAD}.weight"} if config.tied else set()
        for name in names:
            if name not in self._waiting and name not in shared and not has_no_effect(name, config):
                raise QuasarError(f"{self.files.folder} holds {name}, which {config.architecture} does not have.")

    def refuse_left_over(self, names: Sequence[str]) -> None:
        """QuasarError for one of these stored tensors that nothing is made of."""
        left = next((name for name in names if name not in self._waiting), None)
        if left:
            raise QuasarError(f"{self.files.folder} holds {left}, which quasar has no place for.")

    def fill(self, progress: Progress = no_progress, sparing: StreamedWeights | None = None) -> None:
        """Copy everything from the files, file by file; `sparing` memory, which keeps nothing of the files."""
        if sparing is not None:
            self._read(sparing, progress)
        else:
            self._copy(progress)
        if self._centred:
            for norm in self._norms:
                norm += 1
        for weights in self._activations:
            weights.copy_(xielu_weights(weights))
        progress("reading weights", len(self._waiting), len(self._waiting))

    def _copy(self, progress: Progress) -> None:
        with Upload(self.device) as upload:
            for done, (name, stored) in enumerate(self.files.load_many(list(self._waiting))):
                progress("reading weights", done, len(self._waiting))
                for place in self._waiting[name]:
                    upload.copy(place, stored)

    def _read(self, sparing: StreamedWeights, progress: Progress) -> None:
        for done, (name, places) in enumerate(self._waiting.items()):
            progress("reading weights", done, len(self._waiting))
            for place in places:
                sparing.fill(name, place)

    def _empty(self, *shape: int) -> torch.Tensor:
        return empty_in_huge_pages(*shape, device=self.device, dtype=self.dtype)
