"""The figures of the planner on the pages are what it says now."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nemo_aapo.planning import layouts
from nemo_aapo.prepare.plan import prepare_plan

pytestmark = pytest.mark.slow

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guide"
GIB = 2**30


def rows(page: str, head: str) -> list[list[str]]:
    """The cells of the table whose head begins so."""
    table = (GUIDE / page).read_text().split(f"\n| {head} |", 1)[1].split("\n\n", 1)[0]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


def shown(value: float, as_in: str) -> str:
    """A value to as many digits as the page has."""
    return f"{value:.{len(as_in.partition('.')[2])}f}"


RECIPES = {
    "R1-Distill-Qwen-1.5B": "paper_r1_distill_qwen_1_5b",
    "Qwen2.5-Math-7B": "paper_qwen2_5_math_7b",
    "Llama-3.2-1B-Instruct": "paper_llama3_2_1b",
    "Llama-3.2-3B-Instruct": "paper_llama3_2_3b",
}


@pytest.mark.parametrize("row", rows("reproduce_paper.md", "model | GiB on the fullest GPU"), ids=lambda row: row[0])
def test_the_cost_of_the_papers_recipes_is_the_plans(row):
    name, gib, *cells = row
    model = f"model=DeepSeek-{name}" if name.startswith("R1") else f"model={name}"
    recipe = f"experiment={RECIPES[name]}"
    columns = [recipe], [recipe, "algorithm=aapo"], [f"{recipe}_gpg"], [f"{recipe}_grpo"]
    for cell, words in zip(cells, columns, strict=True):
        seconds, hours = re.fullmatch(r"([\d.]+) s, ([\d.]+) h", cell).groups()
        config, question = prepare_plan([*words, model, "hardware=h100"])
        made = layouts.judge(config, question)
        whole = made.seconds * config.trainer.max_steps / 3600
        assert (shown(made.seconds, seconds), shown(whole, hours)) == (seconds, hours), words
        if words == [recipe]:
            assert shown(made.bytes / GIB, gib) == gib


EXPERTS = (
    *("precision=bf16", "model.recompute_granularity=full", "model.optim.use_distributed_optimizer=true"),
    *("trainer.devices=8", "prompts_per_step=256", "group_size=8", "data.max_prompt_tokens=1024"),
    "rollout.max_concurrent_tokens=262144",
)
SHORT = ("rollout.max_new_tokens=7168", "max_tokens_per_microbatch=16384")
LONG = ("rollout.max_new_tokens=31744", "max_tokens_per_microbatch=32768")


EXPERTS_TABLE = rows("moe_and_long_context.md", "model | GPU | nodes")


@pytest.mark.parametrize("number", range(len(EXPERTS_TABLE)))
def test_the_layouts_of_mixtures_of_experts_are_the_quickest_on_the_fewest_nodes(number):
    """Half as many nodes are too few; the longer completions of the text fit on as many."""
    _, gpu, nodes, layout, gib, minutes = EXPERTS_TABLE[number]
    model = next(row[0] for row in reversed(EXPERTS_TABLE[: number + 1]) if row[0])
    words = [f"model={model}", f"hardware={gpu.partition(',')[0].lower()}", *EXPERTS]
    first, _, longer = layout.partition("; for the longer ")
    best = quickest(*words, *SHORT, f"trainer.num_nodes={nodes}")
    peak, minutes = gib.partition(" ")[0], minutes.removesuffix(" min")
    found = sizes(str(best.layout)), shown(best.bytes / GIB, peak), shown(best.seconds / 60, minutes)
    assert best.fits
    assert found == (sizes(first), peak, minutes)
    for_longer = quickest(*words, *LONG, f"trainer.num_nodes={nodes}")
    assert for_longer.fits
    assert sizes(str(for_longer.layout)) == sizes(longer or first)
    if int(nodes) > 1:
        assert not quickest(*words, *SHORT, f"trainer.num_nodes={int(nodes) // 2}").fits


def quickest(*words: str) -> layouts.Verdict:
    return layouts.judge_all(*prepare_plan(words))[0]


def sizes(layout: str) -> dict[str, int]:
    """``TP 4, DP 2, EP 8`` and the like, without those of 1."""
    return {name: int(size) for name, size in re.findall(r"(\w+) (\d+)", layout) if size != "1"}
