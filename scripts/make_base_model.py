"""Makes a quickstart's tiny base model and its data: ``python scripts/make_base_model.py [--experts] [--out DIR]``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/ stands beside the scripts

from examples.quickstart.base_model import BaseModelError, MixtureRecipe, Recipe, make_base_model
from nemo_aapo.errors import ConfigError
from nemo_aapo.utils.files import require_directory


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", action="store_true", help="a mixture of experts, for experiment=quickstart_moe")
    parser.add_argument("--out", type=Path, help="the model's directory; by default the one that the experiment names")
    parser.add_argument("--seed", type=int, default=0, help="of data, initial weights and order")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    arguments = parser.parse_args()
    try:
        kind, out = (MixtureRecipe, "quickstart_moe_base") if arguments.experts else (Recipe, "quickstart_base")
        recipe, directory = kind(seed=arguments.seed), arguments.out or Path("results") / out
        require_directory(directory, f"--out {directory}")
        make_base_model(directory, recipe, force=arguments.force, log=lambda text: print(text, flush=True))
    except (BaseModelError, ConfigError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
