"""A model so small that its training step compiles in seconds."""

from hymba_jax.config import AttentionConfig, ComputeConfig, HymbaConfig

MODEL = HymbaConfig(
    vocab_size=61,
    hidden_size=16,
    mlp_size=24,
    layers="2*W",
    attention=AttentionConfig(
        num_heads=2, num_kv_heads=1, window=4, qk_norm="perhead-rms", rope_type="default"
    ),
    num_meta_tokens=3,
    max_positions=64,
)
COMPUTE = ComputeConfig()
