"""Random tiny Hugging Face models and configurations for tests."""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}


def make_tiny_models(folder: Path) -> dict[str, Path]:
    """Qwen2 (tied and untied), Qwen3, its mixture of experts, and Llama, each in a directory of its own."""
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

    made = {}
    for name, config in {
        "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=False),
        "qwen2_tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
        "qwen3": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
        "qwen3_moe": Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=16, tie_word_embeddings=False),
        "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    }.items():
        made[name] = folder / name
        save_model(config, made[name])
        save_character_tokenizer(made[name])
    return made


def save_empty_model(directory: Path, **changes: Any) -> Path:
    """A Qwen2 directory whose weights are holes in a file: enough for every check before they are read.

    Args:
        changes: of ``config.json``.
    """
    from nemo_aapo.models.directory import shape_of
    from nemo_aapo.models.weights import expected_tensors

    shape = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 100}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    config = {"architectures": ["Qwen2ForCausalLM"], **shape, **heads, **changes}
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_headers(directory / "model.safetensors", expected_tensors(shape_of(config)))
    (directory / "tokenizer_config.json").write_text("{}")  # by its name a tokenizer, which is not loaded
    return directory


BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I32": 4, "I8": 1, "U8": 1, "F8_E4M3": 1}


def save_headers(path: Path, shapes: Mapping[str, Sequence[int]], dtype: str = "BF16", **dtypes: str) -> None:
    """A whole safetensors file of zeros, which take no space on the disk.

    Args:
        shapes: by name of the tensor.
        dtypes: of single tensors, by name with ``.`` written as ``__``.
    """
    header, end = {}, 0
    for name, shape in shapes.items():
        kind = dtypes.get(name.replace(".", "__"), dtype)
        begin, end = end, end + math.prod(shape) * BYTES[kind]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def save_empty_input(folder: Path) -> list[str]:
    """The settings without a default, for a model of zeros and data of one question: nothing is left to refuse.

    Their order: ``model.path``, ``data.train``, ``data.validation``, ``run.dir``.
    """
    model = save_empty_model(folder / "model")
    for name in ("train", "validation"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"question": f"{name}?", "answer": "1"}) + "\n")
    data = [f"data.{name}={folder}/{name}.jsonl" for name in ("train", "validation")]
    return [f"model.path={model}", *data, f"run.dir={folder / 'run'}"]


def save_model(config: Any, directory: Path, seed: int = 0, norms: float = 1.0) -> None:
    """A random model of this configuration; biases and norms too, so that none can be lost unnoticed.

    Args:
        norms: mean of the norms' weights; 0 for families that add 1 to them.
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else norms, std=0.1)
        else:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(directory)


def save_scripted_model(directory: Path, says: Sequence[str], **generation: Any) -> None:
    """A Qwen2 that says these tokens one after the other whatever it is asked, the last for ever, and a tokenizer.

    Its layers are zero, so that the embedding of a token alone decides which follows; no token may be said twice.

    Args:
        says: each a character that no prompt ends with, or a special token: ``<eos>``, or one in angle brackets of
            one's own.
        generation: changes of ``generation_config.json``.
    """
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    tags = [token for token in says if len(token) > 1 and token != "<eos>"]
    save_character_tokenizer(directory, tags)
    ids = AutoTokenizer.from_pretrained(directory).convert_tokens_to_ids(list(says))
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=False)).float()
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        embedding, head = model.model.embed_tokens.weight.zero_(), model.lm_head.weight.zero_()
        embedding[:, 0] = 1.0  # of any other token: the first follows
        for place, (token, following) in enumerate(zip(ids, [*ids[1:], ids[-1]], strict=True), start=1):
            embedding[token] = torch.eye(SIZES["hidden_size"])[place]
            head[following, place] += 10.0
        head[ids[0], 0] = 10.0
    model.generation_config.update(**generation)
    model.save_pretrained(directory)


def save_character_tokenizer(directory: Path, tags: Sequence[str] = ()) -> None:
    """One token per printable ASCII character; <pad> is 0 and <eos> is 1, special tokens of one's own from 97 on."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<eos>": 1, **{chr(code): code - 30 for code in range(32, 127)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    made.add_special_tokens({"additional_special_tokens": list(tags)})
    made.save_pretrained(directory)


def make_config(
    model: Path | str, train: Path | str = "train.jsonl", validation: Path | str = "v.jsonl", **changes: Any
):
    """The page's defaults made small; ``changes`` are dotted keys with ``.`` written as ``__``."""
    from omegaconf import OmegaConf

    from nemo_aapo.config import parse

    tree = copy.deepcopy(_page())
    for key, value in {
        "model.path": str(model),
        "data.train": str(train),
        "data.validation": str(validation),
        "data.max_prompt_tokens": 32,
        "rollout.max_new_tokens": 16,
        "prompts_per_step": 4,
        "group_size": 4,
        "max_tokens_per_microbatch": 128,
        "rollout.max_concurrent_tokens": 4096,
        "model.optim.lr": 1e-3,
        "trainer.distributed_timeout_s": 60,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }.items():
        OmegaConf.update(tree, key, value, force_add=True)
    settings: Any = OmegaConf.to_container(tree, resolve=True)
    return parse(settings)


@functools.cache
def _page() -> Any:
    """The main page, read once: there are hundreds of configurations to make."""
    from omegaconf import OmegaConf

    tree: Any = OmegaConf.load(Path(__file__).parents[1] / "conf" / "train_aapo.yaml")
    tree.pop("defaults")
    return tree
