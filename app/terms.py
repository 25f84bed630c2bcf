"""The words that queries, plans and files share, as types."""

from typing import Literal, get_args

Op = Literal["encode", "decode"]
Convention = Literal["scaled", "raw"]
"""Of latents: `scaled` is what a diffusion model sees, `raw` is what the network emits."""
Precision = Literal["auto", "fp16", "bf16", "fp32"]
"""What may be asked for."""
Dtype = Literal["fp16", "bf16", "fp32"]
"""What a forward runs in."""
Tiling = Literal["auto", "never", "always"]
Fp16 = Literal["ok", "overflows", "unknown"]
"""How an autoencoder fares in half precision."""
ExecutionName = Literal["whole", "strips", "recompute"]
"""In this order: each takes less memory than the one before."""
EXECUTIONS: tuple[ExecutionName, ...] = get_args(ExecutionName)
