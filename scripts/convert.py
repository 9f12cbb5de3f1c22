"""Converts models between Hugging Face and Megatron: ``python scripts/convert.py COMMAND --help``."""

from nemo_aapo.cli.convert import main

if __name__ == "__main__":
    raise SystemExit(main())
