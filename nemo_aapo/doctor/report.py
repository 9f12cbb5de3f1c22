"""The findings of all ranks merged into one report, as lines for people and as JSON for programs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TextIO

from nemo_aapo.doctor.finding import Check, Finding, Level, Place

PROBLEMS: tuple[Level, ...] = ("warning", "failure")
LEVELS: tuple[Level, ...] = ("ok", "warning", "failure", "skipped")


class Screen:
    """Prints findings as they come, a line each; on a terminal also the name of the check that runs."""

    def __init__(self, output: TextIO) -> None:
        """Args: output: the stream to print to."""
        self.findings: list[Finding] = []
        self._output = output

    def begin(self, check: Check) -> None:
        """Show that a check runs."""
        if self._output.isatty():
            self._output.write(f"{check.name} ...")
            self._output.flush()

    def report(self, finding: Finding) -> None:
        """Print and keep a finding."""
        self.findings.append(finding)
        wipe = "\r\033[K" if self._output.isatty() else ""
        print(f"{wipe}{line(finding)}", file=self._output, flush=True)


def merge(found: Mapping[int, Sequence[Finding]], hosts: Mapping[int, str]) -> list[Finding]:
    """One finding for each name: the first rank's if all is well, else each problem with the ranks that have it.

    Args:
        found: the findings of each rank; a rank that a check does not concern has none.
        hosts: rank -> machine.
    """
    by_name: dict[str, dict[int, Finding]] = {}
    for rank in sorted(found):
        for finding in found[rank]:
            by_name.setdefault(finding.name, {})[rank] = finding
    return [line for findings in by_name.values() for line in _lines(findings, hosts)]


def _lines(findings: Mapping[int, Finding], hosts: Mapping[int, str]) -> list[Finding]:
    different = list(dict.fromkeys(findings.values()))
    problems = [finding for finding in different if finding.level in PROBLEMS]
    if not problems or len(different) == 1:
        return different[:1]
    return [
        Finding(
            problem.name,
            problem.level,
            f"{_where([rank for rank in findings if findings[rank] == problem], hosts)}: {problem.text}",
            problem.remedy,
        )
        for problem in problems
    ]


def _where(ranks: Sequence[int], hosts: Mapping[int, str]) -> str:
    places = [f"{rank} on {hosts[rank]}" for rank in ranks]
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(places)


def line(finding: Finding) -> str:
    """A finding as a line for people."""
    remedy = f". Remedy: {finding.remedy}" if finding.remedy else ""
    return f"{finding.level:<8} {finding.name:<23} {finding.text}{remedy}"


def summary(findings: Sequence[Finding], seconds: float) -> str:
    """The last line of the report: how many findings of each level, and the seconds that all took."""
    counts = Counter(finding.level for finding in findings)
    return f"{', '.join(f'{counts[level]} {level}' for level in LEVELS)}; {seconds:.0f} s"


def failed(findings: Sequence[Finding]) -> bool:
    """Whether one of them is a failure."""
    return any(finding.level == "failure" for finding in findings)


def to_json(findings: Sequence[Finding], place: Place, seconds: float) -> str:
    """The whole report as JSON for programs."""
    report = {
        "ok": not failed(findings),
        "host": place.host,
        "ranks": place.world_size,
        "seconds": round(seconds, 1),
        "findings": [asdict(finding) for finding in findings],
    }
    return json.dumps(report, indent=1, ensure_ascii=False)
