"""`python -m hymba_jax`, the same as `hymba`."""

from hymba_jax.cli import main

if __name__ == "__main__":
    main()
