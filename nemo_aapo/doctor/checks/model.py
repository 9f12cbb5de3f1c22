"""Checks the model directory, its layout over the ranks, and its tokenizer."""

from __future__ import annotations

from pathlib import Path

from nemo_aapo.config import derive
from nemo_aapo.data.tokenizer import load_text, render_prompts
from nemo_aapo.doctor.checks.sizes import count_parameters
from nemo_aapo.doctor.finding import Context, Finding
from nemo_aapo.models.directory import read_config_json, read_model_dir, shape_of
from nemo_aapo.text.transformers5 import said


def model(context: Context) -> Finding:
    """Check that every file is complete, the weights are the model's, and the layout divides it."""
    config, place = context.run_config, context.place
    shape = read_model_dir(config.model.path)
    asked = config.trainer.num_nodes * config.trainer.devices
    derive(config, shape, place.world_size if place.world_size > 1 else asked)
    count = count_parameters(Path(config.model.path))
    tp, pp = config.model.tensor_model_parallel_size, config.model.pipeline_model_parallel_size
    cp = config.model.context_parallel_size
    layout = f"tensor {tp} x pipeline {pp}" + (f" x context {cp}" if cp > 1 else "")
    if shape.experts is not None:
        layout += f", {shape.experts.count} experts over {config.model.expert_model_parallel_size},"
    text = f"{shape.architecture}, {shape.num_layers} layers, {count:,} parameters; all files whole, the weights fit"
    return Finding("model", "ok", f"{text}; {layout} on {asked} ranks divides it{said(Path(config.model.path))}")


def tokenizer(context: Context) -> Finding:
    """Check that it loads, has an end token, renders a prompt, and has no more tokens than the model's vocabulary."""
    config = context.run_config
    vocabulary, data = shape_of(read_config_json(Path(config.model.path))).vocab_size, config.data
    text = load_text(config.model.path, vocabulary, trust_remote_code=config.model.trust_remote_code)
    loaded = text.tokenizer
    render_prompts(
        loaded,
        ["What is 2 + 2?"],
        system_prompt=data.system_prompt,
        chat_template=data.chat_template,
        prompt_template=data.prompt_template,
        template_arguments=data.template_arguments,
    )
    templated = data.chat_template == "auto" and bool(loaded.chat_template)
    facts = f"{len(loaded)} tokens in a vocabulary of {vocabulary}, ends with {text}"
    return Finding("tokenizer", "ok", f"{facts}, {'with its' if templated else 'no'} chat template")
