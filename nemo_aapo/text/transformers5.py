"""What transformers 5 writes into a model directory, in the words of transformers 4.57, which all of the code goes by.

``config.json``: transformers 5 has ``rope_parameters`` in place of ``rope_theta``, ``rope_scaling`` and
``partial_rotary_factor``, and for Qwen3-MoE ``num_local_experts`` in place of ``num_experts``; where these are missing,
4.57 takes its defaults without a word. ``tokenizer_config.json``: special tokens beyond the named ones are a list
called ``extra_special_tokens``, and ``TokenizersBackend`` is the class of tokenizers without one of their own.

In the line ``newest`` transformers is at 5 itself, which reads both.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_aapo import lines
from nemo_aapo.text.files import TOKENIZER_CONFIG, read_settings

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ROPE = "rope_parameters"
BACKEND = "TokenizersBackend"
_OTHER_WORDS = ("rope_theta", "rope_local_base_freq", "partial_rotary_factor")
"""What stands in ``rope_parameters`` and has a key of its own in 4.57; all else is ``rope_scaling``."""
EXPERTS = {"num_local_experts": "num_experts"}
"""4.57's word for a size, in models of the type ``qwen3_moe``."""
_MISTRALS = ("mistral", "mistral3", "voxtral", "ministral", "pixtral")
"""The types of models whose tokenizers transformers 4.57 may rightly warn of."""

# ---------------------------------------------------------------- config.json


def problem(config: Mapping[str, Any]) -> str | None:
    """What of a ``config.json`` can't be said in 4.57's words; None: all can, or nothing needs to."""
    rope = _of_all_layers(config) or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        return f"{ROPE} of transformers 5 differ between kinds of layers, which transformers 4.57 can't say"
    plain = {key: value for key, value in config.items() if value not in (None, {"rope_type": "default"})}
    twice = [key for key, value in translation(config).items() if plain.get(key, value) != value]
    if twice:
        new = [key for key in (ROPE, *EXPERTS) if key in config]
        return f"{' and '.join([*new, *twice])} contradict each other: remove what is wrong"
    return None


def translation(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that 4.57 needs for what transformers 5 says otherwise; empty where it says nothing so.

    Example: ``{"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}`` gives
    ``{"rope_theta": 1e6, "rope_scaling": None}``.
    """
    found: dict[str, Any] = {}
    if config.get("model_type") == "qwen3_moe":
        found = {old: config[new] for new, old in EXPERTS.items() if config.get(new) is not None}
    rope = _of_all_layers(config)
    if not isinstance(rope, dict):
        return found
    found |= {key: rope[key] for key in _OTHER_WORDS if rope.get(key) is not None}
    scaling = {key: value for key, value in rope.items() if key not in _OTHER_WORDS}
    return {**found, "rope_scaling": None if rope_type(scaling) == "default" else scaling}


def _of_all_layers(config: Mapping[str, Any]) -> Any:
    """``rope_parameters``; Gemma 3's, which are of two kinds of layers, as those of one with a key more."""
    rope = config.get(ROPE)
    if config.get("model_type") != "gemma3_text" or not isinstance(rope, dict):
        return rope
    whole, local = rope.get("full_attention"), rope.get("sliding_attention")
    if len(rope) > 2 or not isinstance(whole, dict) or not isinstance(local, dict) or rope_type(local) != "default":
        return rope
    return {**whole, "rope_local_base_freq": local.get("rope_theta")}


def rope_type(scaling: Mapping[str, Any]) -> str:
    """The kind of position embedding that ``rope_scaling`` or ``rope_parameters`` name."""
    return str(scaling.get("rope_type", scaling.get("type", "default")))


def translated_config(directory: Path, config: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration object that transformers makes of a checked directory, with what 4.57 would not read.

    Args:
        config: the directory's ``config.json``.
    """
    from transformers import AutoConfig

    made: PretrainedConfig = AutoConfig.from_pretrained(directory, **({} if _is_5() else translation(config)))
    if hasattr(made, "quantization_config"):  # of weights that are there as numbers, or none would have been read
        del made.quantization_config
    return made


@contextlib.contextmanager
def readable_directory(directory: Path) -> Iterator[Path]:
    """A directory that 4.57 reads rightly by itself, for programs that are only given its path.

    That is the directory itself, or one of links to its files with a ``config.json`` of its own, which is there inside.
    """
    config = read_settings(directory / "config.json")
    if not translation(config):
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="model_") as folder:
        for file in directory.absolute().iterdir():
            (Path(folder) / file.name).symlink_to(file)
        (Path(folder) / "config.json").unlink()
        kept = {key: value for key, value in config.items() if key not in (ROPE, *EXPERTS)}
        (Path(folder) / "config.json").write_text(json.dumps({**kept, **translation(config)}), encoding="utf-8")
        yield Path(folder)


# ---------------------------------------------------------------- tokenizer_config.json


def tokenizer_class(directory: Path) -> Any:
    """What of transformers loads the directory's tokenizer.

    Transformers 5 puts the tokenizers of some families together anew, by rules of the family where ``tokenizer.json``
    has others. Here that file decides, as it does in 4.57.
    """
    settings = read_settings(directory / TOKENIZER_CONFIG)
    if _is_5() and (directory / "tokenizer.json").exists() and "auto_map" not in settings:
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    if settings.get("tokenizer_class") == BACKEND:
        from nemo_aapo.text.tokenizers_backend import TokenizersBackend

        return TokenizersBackend
    from transformers import AutoTokenizer

    return AutoTokenizer


def tokenizer_arguments(directory: Path) -> dict[str, Any]:
    """What transformers must be told to load a directory's tokenizer as it was meant.

    From 4.57.3 on it warns of an "incorrect regex pattern" with every model that such a version has saved, and advises
    ``fix_mistral_regex=True``, which gives other tokens. Of models that are not Mistral's it is not true.
    """
    settings, config = read_settings(directory / TOKENIZER_CONFIG), read_settings(directory / "config.json")
    told: dict[str, Any] = {}
    extra = settings.get("extra_special_tokens")
    if isinstance(extra, list) and not _is_5():
        names = [token["content"] if isinstance(token, dict) else token for token in extra]
        before = settings.get("additional_special_tokens") or []
        told = {"extra_special_tokens": {}, "additional_special_tokens": [*before, *names]}
    is_fast = (directory / "tokenizer.json").exists()
    if is_fast and config.get("model_type") not in _MISTRALS and "fix_mistral_regex" not in settings:
        told["fix_mistral_regex"] = False
    return told


# ---------------------------------------------------------------- for people


def said(directory: Path) -> str:
    """A phrase on what of a model directory is read otherwise than it is written; empty if nothing is."""
    if _is_5():
        return ""
    words = [f"{key}={value}" for key, value in translation(read_settings(directory / "config.json")).items()]
    settings = read_settings(directory / TOKENIZER_CONFIG)
    words += ["tokenizer_class=PreTrainedTokenizerFast"] if settings.get("tokenizer_class") == BACKEND else []
    words += ["additional_special_tokens"] if isinstance(settings.get("extra_special_tokens"), list) else []
    return f"; written by transformers 5 and read with {', '.join(words)}" if words else ""


def _is_5() -> bool:
    """Whether transformers reads such directories by itself here."""
    return lines.installed("transformers") is lines.NEWEST
