"""Inputs of a plan from the words of a command line, and the parameter counts that models are published with."""

from __future__ import annotations

from nemo_aapo.planning.inputs import Inputs, plan_inputs
from nemo_aapo.prepare.plan import prepare_plan

PUBLISHED_PARAMETERS = {
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen2.5-Math-7B": 7_615_616_512,
    "DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-235B-A22B": 235_093_634_560,
}
"""The totals of the safetensors headers, as the Hugging Face Hub shows them."""


def made_inputs(*words: str) -> Inputs:
    return plan_inputs(*prepare_plan(words))
