"""The scripts as modules, and as commands whose imports are looked at."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

SCRIPTS = Path(__file__).parents[1] / "scripts"
HEAVY = ("torch", "transformers", "megatron", "nemo", "lightning")


def load_script(name: str) -> ModuleType:
    """``scripts/NAME.py``, not run."""
    spec = importlib.util.spec_from_file_location(f"{name}_script", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def exit_code_and_heavy_imports(name: str, words: Sequence[str]) -> str:
    """What a script ended with, and which heavy packages it had imported by then, as ``2 []``."""
    script = SCRIPTS / f"{name}.py"
    code = (
        f"import runpy, sys; sys.argv = {[script.name, *words]!r}\n"
        f"try: runpy.run_path({str(script)!r}, run_name='__main__')\n"
        f"except SystemExit as end: print(end.code, sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=SCRIPTS.parent, capture_output=True, text=True, timeout=60)
    return done.stdout.strip() or done.stderr
