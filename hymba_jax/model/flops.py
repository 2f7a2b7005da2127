"""How much arithmetic the model needs, whatever an implementation does."""

from typing import Any

import jax
import numpy as np

from hymba_jax.config import HymbaConfig


def forward_flops(config: HymbaConfig, params: Any, length: int, *, predicted: int) -> float:
    """Floating-point operations of reading one text, a product and its sum being two.

    Each token meets every kernel. Each query meets the keys that its mask shows it, meta tokens
    included: 2 heads (head_dim + value_dim) each. Each position of the scan takes 9 a state and
    channel (delta A, its exponential, times h; delta x, times B, their sum; times C, the sum over
    states; what D and the gate add) and each tap of the convolution 2 a channel. Norms, rotation
    and softmax are left out, and so is all that meta tokens compute: no text needs it anew.

    Args:
      params: the tree of parameters, or of their shapes.
      length: tokens of the text.
      predicted: positions whose logits are computed.
    """
    kernels = sum(
        int(np.prod(leaf.shape))
        for path, leaf in jax.tree.leaves_with_path(params)
        if (name := jax.tree_util.keystr(path)).endswith("['kernel']") and "lm_head" not in name
    )
    before = np.arange(1, length + 1)
    seen = {
        "global": before.sum(),
        "window": np.minimum(before, config.attention.window + 1).sum(),
    }
    a_key = 2 * config.attention.num_heads * (config.head_dim + config.value_dim)
    attention = sum(
        a_key * (seen[spec.attention] + config.num_meta_tokens * length)
        for spec in config.layer_specs
        if spec.attention
    )
    a_channel = 9 * config.ssm.state_size + 2 * config.ssm.conv_kernel
    scans = sum(spec.ssm for spec in config.layer_specs) * length * config.channels * a_channel
    vocabulary = config.num_embeddings * config.hidden_size * predicted
    return float(2 * (kernels * length + vocabulary) + attention + scans)


def training_flops(config: HymbaConfig, params: Any, length: int) -> float:
    """Of a text's loss and gradient: three times the forward pass, nothing computed twice."""
    return 3 * forward_flops(config, params, length, predicted=length)
