"""A simulation as rows of a table for people, and as a tree for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from nemo_aapo.planning.simulation.schedule import Outcome
from nemo_aapo.planning.simulation.splits import DEPTHS, Simulation, Split


def head(simulation: Simulation) -> str:
    """What was simulated."""
    return (
        f"{simulation.steps} steps simulated on {simulation.gpus} GPUs, at the same lower bounds; lengths: "
        f"{simulation.lengths}\n(drawn: mean {simulation.mean_tokens:,.0f} tokens, the longest of a step "
        f"{simulation.tail_factor:.1f} x; rollout.max_new_tokens cuts {simulation.truncated_fraction:.1%})"
    )


def rows(simulation: Simulation) -> list[list[str]]:
    """Seconds of a step of each split by ``rollout.async_depth``; * marks the shortest of a column."""
    best = {depth: simulation.best(depth) for depth in DEPTHS}
    found = [["seconds of a step, rollout.async_depth", *map(str, DEPTHS), "busy: trainer", "engines"]]
    for split in simulation.splits:
        cells = [_seconds(split.outcomes.get(depth), split is best[depth]) for depth in DEPTHS]
        found.append([_name(split), *cells, *_busy(split.outcomes[max(split.outcomes)])])
    for refit in simulation.refits:
        cells = [_seconds(refit.outcomes[depth], False) for depth in DEPTHS]
        found.append([f"  fastest with servers, refit={refit.kind}", *cells, *_busy(refit.outcomes[DEPTHS[-1]])])
    return found


def verdict(simulation: Simulation) -> str:
    """Which split is the best one."""
    best = {depth: split for depth in DEPTHS if (split := simulation.best(depth))}
    depth = min(best, key=lambda depth: best[depth].outcomes[depth].step_s)
    on_policy, fastest = best[0].outcomes[0].step_s, best[depth].outcomes[depth].step_s
    said = f"best on policy: {_name(best[0])}, {on_policy:.2f} s"
    if depth == 0:
        said = f"{said}; no staleness is faster"
    else:
        said = f"{said}; best: {_name(best[depth])}, async_depth {depth}, {on_policy / fastest:.2f} times as fast"
    shortest = {refit.kind: min(outcome.step_s for outcome in refit.outcomes.values()) for refit in simulation.refits}
    kind = min(shortest, key=shortest.__getitem__, default=None)
    if kind is None or shortest[kind] >= fastest:
        return said
    return f"{said}\nrollout.refit={kind} on the fastest split with servers: {shortest[kind]:.2f} s"


def tree(simulation: Simulation) -> dict[str, Any]:
    """All figures, unrounded."""
    best = {str(depth): _name(split) for depth in DEPTHS if (split := simulation.best(depth))}
    return {**asdict(simulation), "best": best}


def _name(split: Split) -> str:
    if not split.servers:
        return f"colocated, {split.layout}"
    servers = "1 server" if split.servers == 1 else f"{split.servers} servers"
    return f"{split.layout.ranks} GPUs + {servers} x {split.server_gpus}"


def _seconds(outcome: Outcome | None, best: bool) -> str:
    return "" if outcome is None else f"{outcome.step_s:.2f}{'*' if best else ' '}"


def _busy(outcome: Outcome) -> list[str]:
    return [f"{outcome.trainer_busy:.0%}", f"{outcome.engines_busy:.0%}"]
