"""Makes the quickstart's tiny base model and its data: ``python scripts/make_base_model.py --out DIR``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/ stands beside the scripts

from examples.quickstart.base_model import BaseModelError, Recipe, make_base_model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/quickstart_base"), help="the model's directory")
    parser.add_argument("--seed", type=int, default=0, help="of data, initial weights and order")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    arguments = parser.parse_args()
    try:
        recipe = Recipe(seed=arguments.seed)
        make_base_model(arguments.out, recipe, force=arguments.force, log=lambda text: print(text, flush=True))
    except BaseModelError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
