"""What ``test_lines.py`` runs in a line's own process: ``python -m tests.lines.directories write|read FOLDER...``."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

NAMES = ("qwen2_tied", "qwen3_moe", "llama")
TEXTS = ["What is 12 + 7?", "  two  spaces<eos>", "a\tb\nc"]


def write(folder: Path) -> None:
    """Tiny models as the installed transformers saves them."""
    from tests.tiny_models import make_tiny_models

    make_tiny_models(folder)


def read(folders: list[Path], exports: Path) -> None:
    """Print, by directory, its shape, the tokens of ``TEXTS``, the model's log-probs, and the files of its export."""
    import numpy as np
    import torch

    from nemo_aapo.conversion import megatron_model
    from nemo_aapo.conversion.session import session
    from nemo_aapo.conversion.verify import _logits
    from nemo_aapo.data.tokenizer import load_tokenizer
    from nemo_aapo.models.directory import read_model_dir

    found = {}
    with session(1, 1):
        for path in (folder / name for folder in folders for name in NAMES):
            weight_map, module = megatron_model.build(path, torch.float32)
            weight_map.load(module)
            target = exports / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            weight_map.save(module, target)
            found[f"{path.parent.name}/{path.name}"] = {
                "shape": repr(read_model_dir(str(path))),
                "tokens": load_tokenizer(str(path))(TEXTS)["input_ids"],
                "logits": hashlib.sha256(_logits(module, np.arange(2, 60)).contiguous().numpy().tobytes()).hexdigest(),
                "as it was": sorted(
                    file.name for file in path.iterdir() if (target / file.name).read_bytes() == file.read_bytes()
                ),
            }
    print(json.dumps(found))


if __name__ == "__main__":
    task, *places = [sys.argv[1], *map(Path, sys.argv[2:])]
    write(*places) if task == "write" else read(places[:-1], places[-1])
