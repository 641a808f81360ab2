"""Triton kernels for passes of a few tokens on CUDA: products, norms, rotation, attention, choices.

Every function launches its kernels on the current stream, allocates nothing (results go to the buffers given, and
scratch is reserved once per device), never waits for the device, and so can be captured in a CUDA graph once it has run
outside of one with the same shapes. Tensors are contiguous and on one device; the 16-bit dtype D16 is bfloat16 or
float16, the same for all of a call. Arithmetic accumulates in float32. A row's result does not depend on T, to the last
bit, wherever the docstring says so. Calls on one device share scratch: they must be on one stream at a time.

Letters: T rows, 1 to 16; D head size; H key-value heads (of experts the hidden size); G query heads per key-value
head; V vocabulary; E experts, k of a token.

`products`
    `multiply_packed(x [T, in], weight: TritonWeight, out [T, out], bias=None, residual=None)`: x·Wᵀ (+ bias)
    (+ residual); `out` may be `residual`. `multiply_dense(x, weight [out, in], out, ...)`: the same for 16-bit weights.
    With `gated=True` the outputs are gates and what they gate: silu(gate) · up → out [T, out ÷ 2]; its shapes are
    tuned as those of `tune.GatedWeight(weight)`.
`eight_bit`
    `quantize_rows(x [T, in], codes [T, in], steps [T])`: x ≈ codes · steps; codes int8 or float8_e4m3fn, steps float32.
    `multiply_w8a8(codes, steps, weight [out, in], scales [out], out, bias=None, residual=None)`: rows and weights of
    one 8-bit dtype, scales float32.
`elementwise`
    `rms_norm_residual(hidden [T, in], delta [T, in] or None, weight [in], eps, out [T, in], steps=None)`: hidden +=
    delta in place; out = norm(hidden) · weight, with `steps` [T] rounded to 8 bits as by `quantize_rows`.
    `silu_multiply(gate_up [T, 2·I], out [T, I])`: silu(gate) · up. `silu_multiply_rounded(gate_up, codes, steps)`: that
    rounded to 8 bits.
`rotation`
    `rotate_and_store(qkv [T, (H·G + 2·H)·D], rotation, position [1], keys, values [H, capacity, D],
    queries [T, H·G, D], depths=None)`: queries and keys normed and rotated as a `Rotation` says, keys and values
    written at position + t; the nodes of a tree are rotated by position + depth.
`attention`
    `attend(queries [T, H·G, D], keys, values [H, capacity, D], position [1], window or None, workspace,
    out [T, H·G·D], max_length, tree=None, rotation=None, merges=False)`: causal; token t sees position + t + 1
    positions, a node of a tree its own ancestors alone. With a `rotation` it does what `rotate_and_store` does first,
    and with `merges` it is one launch.
`shares`
    How positions are split among programs; `attention_workspace(device, tokens, heads, head_size, max_length)`.
`routing`
    `choose_experts(scores [T, E], kind, chosen [T, k] int32, shares [T, S], last [1], ...)`: each token's best experts,
    or −1 behind the token `last`, and their shares. `add_experts(rows [T·k, H], chosen, shares, out [T, H], always)`.
`routed`
    `routed_weight(weights of E experts, k) -> RoutedWeight`. `multiply_routed(x [T or T·k, in], weight, chosen [T, k],
    out [T·k, out], gated=False)`: the product of each place's expert; T is at most 40.
`choices`
    `argmax_and_margin(logits [T, V], tokens [T] int64, best [T] float32, second [T] float32)`: the first greatest logit
    of a row (−1 where it is not a finite number), and the next. `likeliest_tokens(logits [T, V], likeliest [T, K]
    int32)`: those of the K greatest logits, in order. `accept_greedy(choices, tokens [T], drafted,
    accepted [1])`, all int64: how many of the `drafted` tokens behind the pass's first one the choices confirm.
`weights`
    `prepare_packed(weight: QuantizedWeight, device, tight=False) -> TritonWeight`: codes in the kernel's order.
`language`
    `overlapping(wanted)`: a context whose launches may begin before the one before them has ended; results are equal.
`tune`
    `tune(weights, dtype) -> Blocks`: the best block shapes for weights of one shape, kept for this device.
    `tune_missing(weights, dtype) -> str`: those of every shape that is not kept yet, in a few seconds; what was done.

Importing this package imports no Triton; the modules of the kernels do.
"""
