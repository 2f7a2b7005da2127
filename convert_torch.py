"""Converts checkpoints: `python convert_torch.py SOURCE TARGET`, the same as `hymba convert`."""

from hymba_jax.cli import convert

if __name__ == "__main__":
    convert()
