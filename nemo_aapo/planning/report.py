"""A plan as text for people, and as a plain tree for programs."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict
from typing import Any

from nemo_aapo.planning import compute, parameters
from nemo_aapo.planning.compute import Phase
from nemo_aapo.planning.inputs import Layout
from nemo_aapo.planning.layouts import Verdict
from nemo_aapo.planning.memory import RankMemory
from nemo_aapo.planning.plan import Plan
from nemo_aapo.planning.simulation import table as simulated

GIB = 2**30
MOST_LAYOUTS = 12
NOT_MODELLED = (
    "Not modelled: rewards, validation, checkpoints, kernel launches, latency of collectives, padding, temporaries of\n"
    "one layer, fragmentation. docs/design/planning.md has the formulas, their sources, and what was checked."
)


def text(plan: Plan) -> str:
    """Tables for a terminal of 120 columns."""
    blocks = [_head(plan), _memory(plan), _server(plan), _step(plan), _store(plan), _layouts(plan), _simulation(plan)]
    blocks.append(NOT_MODELLED)
    return "\n\n".join(block for block in blocks if block) + "\n"


def _head(plan: Plan) -> str:
    inputs, model, work = plan.inputs, plan.inputs.model, plan.inputs.work
    count, layout, learner = parameters.whole(model), inputs.layout, inputs.learner
    lines = [
        f"{model.name} on {layout.ranks} x {inputs.hardware.name}: {_name(layout)}, {learner.numbers}, "
        f"recomputation {learner.recompute or 'none'}, engine {inputs.engine.kind}",
        "",
        f"parameters   {count.total:,}, of which {count.embedding + count.output:,} are embeddings",
    ]
    if model.experts:
        lines += [
            f"             {parameters.active(model):,} active: {model.experts_per_token} of {model.experts} experts "
            "a token",
        ]
    lines += [
        f"lengths      prompts {work.prompt_tokens:,.0f} and completions {work.completion_tokens:,.0f} tokens on "
        "average, as given or the limits",
        f"one step     {work.prompts} prompts x {work.group_size} = {work.completions:,} completions, "
        f"{work.tokens:,.0f} tokens",
    ]
    return "\n".join(lines)


def _name(layout: Layout) -> str:
    return f"{layout}{', sequence parallel' if layout.sequence_parallel else ''}"


def _memory(plan: Plan) -> str:
    needed = plan.memory
    phases = list(needed.phases)
    parts = list(dict.fromkeys(part for phase in phases for part in needed.phases[phase]))
    rows = [["GiB on the fullest rank", *phases]]
    rows += [[part, *(_gib(needed.phases[phase].get(part)) for phase in phases)] for part in parts]
    rows += [["total", *(_gib(needed.total(phase)) for phase in phases)]]
    host = ", ".join(f"{part} {_gib(size)} GiB" for part, size in needed.host.items())
    return _table(rows) + f"\n{_fits(needed)}" + (f"\nin host memory, for each rank: {host}" if host else "")


def _fits(needed: RankMemory) -> str:
    peak, capacity = needed.peak / GIB, needed.capacity / GIB
    if needed.fits:
        return f"fits: {peak:.1f} of {capacity:.1f} GiB"
    return f"DOES NOT FIT: {peak:.1f} GiB needed, {capacity:.1f} there"


def _server(plan: Plan) -> str:
    if (server := plan.server) is None:
        return ""
    layout, engine = server.layout, plan.inputs.engine
    experts = f" x EP {layout.expert}" if layout.expert > 1 else ""
    rows = [["GiB on the fullest rank of a server", ""]]
    rows += [[part, _gib(size)] for part, size in server.rank.phases["serve"].items()]
    rows += [["total", _gib(server.rank.peak)]]
    return (
        f"{_table(rows)}\n{_fits(server.rank)}; {engine.engines} servers of TP {layout.tensor} x PP {layout.pipeline}"
        f"{experts}\nroom for the KV cache of {server.kv_tokens:,.0f} tokens; "
        f"rollout.max_concurrent_tokens={server.wanted_tokens}"
    )


def _gib(size: float | None) -> str:
    return "" if size is None else f"{size / GIB:.2f}"


def _step(plan: Plan) -> str:
    phases, measured = plan.step, plan.measured_step
    rows = [["one step, at least", "tokens", "TFLOP", "seconds", *(["at measured rates"] if measured else []), "limit"]]
    for i, phase in enumerate(phases):
        more = [f"{measured[i].seconds:.2f}"] if measured else []
        rows.append([phase.name, *_figures(phase), *more, phase.limit])
    total = compute.seconds_of(phases)
    rows.append(["step", "", "", f"{total:.2f}", *([f"{compute.seconds_of(measured):.2f}"] if measured else []), ""])
    drawn = plan.inputs.work.completions * plan.inputs.work.completion_tokens
    return _table(rows, left=(0, len(rows[0]) - 1)) + (
        f"\nat most {drawn / total:,.0f} completion tokens/s; one completion of the longest length, alone, takes "
        f"{plan.straggler_seconds:.1f} s at least"
    )


def _figures(phase: Phase) -> list[str]:
    return [f"{phase.tokens:,.0f}", f"{phase.flops / 1e12:,.1f}", f"{phase.seconds:.2f}"]


def _store(plan: Plan) -> str:
    work, saving = plan.inputs.work, plan.saving
    if work.reference is None:
        return ""
    without_s = compute.seconds_of(plan.step) - sum(phase.seconds for phase in plan.step if phase.name == "reference")
    longer = 1 + saving.online_seconds / max(1, work.steps) / without_s
    fewer, less_s = saving.online_completions - saving.stored_completions, saving.online_seconds - saving.stored_seconds
    rows = [
        [f"reference rewards, {work.steps} steps", "completions", "at least", ""],
        _cost("drawn each step", saving.online_completions, saving.online_seconds, f"steps are {longer:.2f} x as long"),
        _cost(
            "drawn once and stored",
            saving.stored_completions,
            saving.stored_seconds,
            f"{work.reference_samples} for each of {saving.distinct_prompts:,} prompts",
        ),
        _cost("saved by the store", fewer, less_s, "by every later run that shares it: all of the first line"),
    ]
    known = (
        "" if saving.data_is_known else "\n(dataset_prompts=N says how many prompts there are; else none comes twice)"
    )
    return _table(rows, left=(0, 3)) + known


def _cost(what: str, completions: int, seconds: float, note: str) -> list[str]:
    return [what, f"{completions:,}", _duration(seconds), note]


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if abs(seconds) < 600 else f"{seconds / 3600:.1f} h"


def _layouts(plan: Plan) -> str:
    possible = [verdict for verdict in plan.layouts if verdict.refused is None]
    shown = [verdict for verdict in possible if _worth_showing(plan, verdict)][:MOST_LAYOUTS]
    rows = [["layouts of these GPUs", "GiB", "", "step, s", ""], *(_verdict(plan, verdict) for verdict in shown)]
    lines = [_table(rows, left=(0, 2, 4))]
    if len(possible) > len(shown):
        lines.append(f"and {len(possible) - len(shown)} more that are possible (--json has all)")
    refused = len(plan.layouts) - len(possible)
    if refused:
        lines.append(f"left out, as what they cut does not divide: {refused} (--json has the reasons)")
    if not plan.layouts[0].fits:
        lines.append(_smallest(plan.smallest))
    return "\n".join(lines)


def _simulation(plan: Plan) -> str:
    if (found := plan.simulation) is None:
        return ""
    return f"{simulated.head(found)}\n{_table(simulated.rows(found))}\n{simulated.verdict(found)}"


def _worth_showing(plan: Plan, verdict: Verdict) -> bool:
    """Context-parallel layouts are for what does not fit otherwise: their ranks would do as data-parallel ones."""
    layout = verdict.layout
    otherwise = dataclasses.replace(layout, context=1, data=layout.copies)
    fitting = {other.layout for other in plan.layouts if other.fits}
    return layout.context == 1 or layout == plan.inputs.layout or (verdict.fits and otherwise not in fitting)


def _verdict(plan: Plan, verdict: Verdict) -> list[str]:
    spare = (plan.memory.capacity - verdict.bytes) / GIB
    judgement = f"fits, {spare:.1f} to spare" if verdict.fits else f"{-spare:.1f} too many"
    mark = "<- as configured" if verdict.layout == plan.inputs.layout else ""
    return [_name(verdict.layout), f"{verdict.bytes / GIB:.1f}", judgement, f"{verdict.seconds:.2f}", mark]


def _smallest(found: Verdict | None) -> str:
    less = (
        "What needs less: model.recompute_granularity=full, less of max_tokens_per_microbatch, max_concurrent_tokens."
    )
    if found is None:
        return f"none fits, nor does any on more GPUs.\n{less}"
    return f"none fits. With these settings {found.layout.ranks} GPUs would do: {_name(found.layout)}.\n{less}"


def _table(rows: list[list[str]], left: tuple[int, ...] = (0,)) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        padded = (cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in enumerate(cells))
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def tree(plan: Plan) -> dict[str, Any]:
    """The plan as a tree for ``--json``: bytes, seconds, FLOPs and counts, unrounded."""
    inputs, count = plan.inputs, parameters.whole(plan.inputs.model)
    return {
        "model": vars(inputs.model),
        "parameters": {**vars(count), "total": count.total, "active": parameters.active(inputs.model)},
        "hardware": asdict(inputs.hardware),
        "layout": vars(inputs.layout),
        "learner": vars(inputs.learner),
        "engine": vars(inputs.engine),
        "work": vars(inputs.work),
        "memory": {
            "phases": plan.memory.phases,
            "host": plan.memory.host,
            "peak": plan.memory.peak,
            "capacity": plan.memory.capacity,
            "fits": plan.memory.fits,
        },
        "server": asdict(plan.server) if plan.server else None,
        "step": _phases(plan.step),
        "step_at_measured_rates": _phases(plan.measured_step) if plan.measured_step else None,
        "straggler_seconds": plan.straggler_seconds,
        "reference_store": vars(plan.saving) if inputs.work.reference else None,
        "layouts": [asdict(verdict) for verdict in plan.layouts],
        "smallest": asdict(plan.smallest) if plan.smallest else None,
        "simulation": simulated.tree(plan.simulation) if plan.simulation else None,
    }


def _phases(phases: tuple[Phase, ...]) -> dict[str, Any]:
    named = {phase.name: {key: value for key, value in vars(phase).items() if key != "name"} for phase in phases}
    return {**named, "seconds": compute.seconds_of(phases)}
