"""The sizes of a recurrent layer, as a config.json has them: a gated delta rule, Mamba-2, or a short convolution.

Letters: C channels of the convolution, K its taps.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, Literal

Kind = Literal["delta", "mamba", "conv"]
# Limits of Mamba-2's steps: none, as JSON has it, and as transformers writes it.
STEPS = (None, [0.0, inf], [0.0, {"__float__": "Infinity"}])


@dataclass(frozen=True)
class RecurrenceConfig:
    """What a recurrent layer reads of each token: queries, keys and values, as attention does, or channels alone.

    Mamba-2's C, B and x are its queries, keys and values; those of a group read the same keys.
    """

    kind: Kind
    taps: int  # K
    key_heads: int = 0
    value_heads: int = 0
    key_size: int = 0
    value_size: int = 0
    width: int = 0  # channels of a short convolution
    conv_bias: bool = False
    bias: bool = False  # of the products before and behind it

    @property
    def keys(self) -> int:
        """Channels of all keys; as many are of queries."""
        return self.key_heads * self.key_size

    @property
    def values(self) -> int:
        """Channels of all values, and of what the layer gives to its last product."""
        return self.width if self.kind == "conv" else self.value_heads * self.value_size

    @property
    def channels(self) -> int:
        """C, what passes through the convolution."""
        return self.width if self.kind == "conv" else 2 * self.keys + self.values

    @property
    def state_elements(self) -> tuple[int, int]:
        """Numbers of a state: of the convolution's window, in the model's dtype; of the matrices, in float32."""
        matrices = 0 if self.kind == "conv" else self.value_heads * self.key_size * self.value_size
        return (self.taps - 1) * self.channels, matrices

    @property
    def journal_elements(self) -> tuple[int, int]:
        """Numbers that are kept of a token, to go back behind it: in the model's dtype, and in float32."""
        return self.channels, 2 * self.value_heads


def read_recurrence(kind: Kind, options: Mapping[str, Any]) -> RecurrenceConfig:
    """The recurrent layers of a config.json whose options are complete."""
    if kind == "delta":
        return RecurrenceConfig(
            kind,
            options["linear_conv_kernel_dim"],
            key_heads=options["linear_num_key_heads"],
            value_heads=options["linear_num_value_heads"],
            key_size=options["linear_key_head_dim"],
            value_size=options["linear_value_head_dim"],
        )
    if kind == "mamba":
        heads, inner = options["mamba_n_heads"], options["mamba_expand"] * options["hidden_size"]
        return RecurrenceConfig(
            kind,
            options["mamba_d_conv"],
            key_heads=options["mamba_n_groups"],
            value_heads=heads,
            key_size=options["mamba_d_state"],
            value_size=inner // heads,
            conv_bias=bool(options["mamba_conv_bias"]),
            bias=bool(options["mamba_proj_bias"]),
        )
    biased = bool(options["conv_bias"])
    return RecurrenceConfig(kind, options["conv_L_cache"], width=options["hidden_size"], conv_bias=biased, bias=biased)


def why_not_recurrence(kind: Kind, options: Mapping[str, Any]) -> str | None:
    """What of a config's recurrent layers contradicts itself, or is more than the decoder has."""
    sizes = {
        "delta": (
            "linear_conv_kernel_dim",
            "linear_num_key_heads",
            "linear_num_value_heads",
            "linear_key_head_dim",
            "linear_value_head_dim",
        ),
        "mamba": ("mamba_n_heads", "mamba_expand", "mamba_d_conv", "mamba_n_groups", "mamba_d_state"),
        "conv": ("conv_L_cache",),
    }[kind]
    missing = [name for name in sizes if not options.get(name)]
    if missing:
        return f"config.json has no {missing[0]}"
    if kind == "mamba" and (options["mamba_expand"] * options["hidden_size"]) % options["mamba_n_heads"]:
        return "its mamba_n_heads do not divide mamba_expand times hidden_size"
    shape = read_recurrence(kind, options)
    if shape.taps < 2:
        return f"its convolutions have {shape.taps} taps"
    if shape.key_heads and shape.value_heads % shape.key_heads:
        return f"{shape.value_heads} heads of values do not share {shape.key_heads} of keys"
    if kind == "mamba" and options.get("time_step_limit") not in STEPS:
        return f"its time_step_limit is {options['time_step_limit']}"
    if kind == "mamba" and options.get("mamba_d_head") not in (None, "auto", shape.value_size):
        return f"its mamba_d_head is not {shape.value_size}"
    return None
