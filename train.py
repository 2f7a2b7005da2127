"""Trains a model: `python train.py --config configs/tiny.toml`, the same as `hymba train`."""

from hymba_jax.cli import train

if __name__ == "__main__":
    train()
