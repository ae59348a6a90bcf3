"""`srun … python -m launch.preflight …`: once on every node of a job, before anything is loaded.

Every node looks at itself with the doctor's checks and leaves a report on the shared file system;
then all of them sum a number over gloo (and NCCL where there are GPUs). The first node waits for
the reports, compares versions, writes one table, `preflight.txt`, and its own address, `head`.
Exit codes: 0 all is well; 1 a failure on some node; 2 a configuration error.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path

from rich.console import Console

from elpo_ray.config import Config
from elpo_ray.config.compose import composed
from elpo_ray.doctor.catalog import node_checks, shared_checks
from elpo_ray.doctor.finding import Check, Finding, Status, examine, failure, ok, print_finding
from elpo_ray.doctor.network import free_ports, own_address
from elpo_ray.doctor.software import fingerprint
from elpo_ray.runs.atomic import write_whole

HEAD_PORTS = 2
"""The job's first ports: Ray's, and the one that this program meets at."""
POLL_S = 0.2
LAST_REPORT_S = 20.0
"""Reports are written right after the sums, which all nodes leave together."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where this process stands in the job."""

    rank: int
    nodes: list[str]
    """Names of all of them; rank i is nodes[i]."""
    port: int
    shared: Path
    timeout_s: float
    """Seconds for the sums, and for the reports of other nodes, counted from the start."""
    began: float = field(default_factory=time.monotonic)

    @property
    def name(self) -> str:
        return self.nodes[self.rank]

    def report(self, rank: int) -> Path:
        return self.shared / f"preflight-{rank}.json"


@dataclass(frozen=True)
class Report:
    """What one node says."""

    versions: dict[str, str]
    findings: list[Finding]

    @classmethod
    def read(cls, path: Path) -> Report:
        record = json.loads(path.read_text(encoding="utf-8"))
        rows = [Finding(**row | {"status": Status(row["status"])}) for row in record["findings"]]
        return cls(record["versions"], rows)


def look(place: Place, config: Config, gpus: int) -> list[Finding]:
    """What this node finds by itself; the first one also looks at what all share."""
    checks = node_checks(config, gpu_count=gpus, nodes=len(place.nodes))
    if place.rank == 0:
        ports = [place.port + offset for offset in range(HEAD_PORTS)]
        checks = [*shared_checks(config), Check("free ports", partial(free_ports, ports)), *checks]
    return list(examine(checks))


def gather(place: Place, findings: Sequence[Finding]) -> None:
    """Leave this node's report where the first node looks for it."""
    report = Report(fingerprint(), list(findings))
    write_whole(place.report(place.rank), json.dumps(asdict(report)))


def wait_for_reports(place: Place) -> tuple[dict[str, Report], list[Finding]]:
    """The reports of all nodes by name, and what is to be said of those that did not come."""
    deadline = max(place.began + place.timeout_s, time.monotonic() + LAST_REPORT_S)
    missing = list(range(len(place.nodes)))
    while missing and time.monotonic() < deadline:
        missing = [rank for rank in missing if not place.report(rank).is_file()]
        time.sleep(POLL_S if missing else 0)
    there = [rank for rank in range(len(place.nodes)) if rank not in missing]
    reports = {place.nodes[rank]: Report.read(place.report(rank)) for rank in there}
    if missing:
        lost = ", ".join(place.nodes[rank] for rank in missing)
        finding = failure(
            "shared files",
            f"no report of {lost} in {place.shared} within {place.timeout_s:.0f} s",
            f"that folder must be the same one on all nodes (set logs=, trainer.run_dir=); if it "
            f"is, see preflight-{lost.split(', ')[0]}.log beside it",
        )
    else:
        finding = ok("shared files", f"{place.shared} is the same on all nodes")
    return reports, [finding]


def versions_equal(reports: dict[str, Report]) -> Iterator[Finding]:
    """One finding for each package that is not the same everywhere."""
    wrong = 0
    for package in sorted({name for report in reports.values() for name in report.versions}):
        nodes: dict[str, list[str]] = {}
        for node, report in reports.items():
            nodes.setdefault(report.versions.get(package, "absent"), []).append(node)
        if len(nodes) > 1:
            wrong += 1
            seen = "; ".join(f"{version} on {', '.join(on)}" for version, on in nodes.items())
            yield failure(
                "versions",
                f"{package}: {seen}",
                "install the same set on all nodes, best on the shared file system or in one image",
            )
    if not wrong:
        yield ok("versions", f"equal on {len(reports)} nodes")


def all_reduce(place: Place, backend: str) -> Iterator[Finding]:
    """Sum over all nodes by gloo or NCCL, from one process each."""
    import torch
    import torch.distributed as dist

    count, began = len(place.nodes), time.monotonic()
    name = f"all-reduce, {backend}"
    device = "cuda:0" if backend == "nccl" else "cpu"
    variable = f"{backend.upper()}_SOCKET_IFNAME"
    try:
        dist.init_process_group(
            backend,
            init_method=f"tcp://{place.nodes[0]}:{place.port + 1}",
            rank=place.rank,
            world_size=count,
            timeout=timedelta(seconds=place.timeout_s),
        )
        value = torch.full((1 << 20,), place.rank + 1.0, device=device)
        dist.all_reduce(value)
        total = float(value[-1])
        dist.destroy_process_group()
    except (RuntimeError, ValueError, OSError) as fault:  # torch.distributed raises all three
        yield failure(
            name,
            f"{own_address()} and {place.nodes[0]}:{place.port + 1}: "
            f"{' '.join(str(fault).split())[:200]}",
            f"let all ports pass between the nodes, and name the interface that joins them: "
            f"environment={{{variable}: ib0}}",
        )
        return
    seconds = time.monotonic() - began
    if total != count * (count + 1) / 2:
        yield failure(name, f"the sum of 1..{count} came out as {total}", "look at NCCL_DEBUG=INFO")
    else:
        yield ok(name, f"{count} nodes, {seconds:.1f} s")


def table(place: Place, reports: dict[str, Report], common: list[Finding]) -> bool:
    """Write `preflight.txt`, failures and warnings of each node by name; whether all is well."""
    rows: list[tuple[str, Finding]] = [("", finding) for finding in common]
    for node, report in reports.items():
        rows += [(node, finding) for finding in report.findings]
    failures = sum(finding.status is Status.FAILURE for _, finding in rows)
    partial_file = place.shared / ".preflight.txt"
    with partial_file.open("w", encoding="utf-8") as file:
        console = Console(file=file, highlight=False, width=200)
        for node, finding in rows:
            if finding.status is not Status.OK or not node or node == place.name:
                print_finding(console, finding, f"{node}, " if node else "")
        console.print(f"preflight: {len(reports)} of {len(place.nodes)} nodes, {failures} failures")
    partial_file.rename(place.shared / "preflight.txt")
    return not failures


def main() -> int:
    """Look at this node together with the others, and return the exit code."""
    parser = argparse.ArgumentParser(prog="launch.preflight", description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", required=True, help="names of the job's nodes, with commas")
    parser.add_argument("--port", type=int, required=True, help="the first of the job's ports")
    parser.add_argument("--shared", type=Path, required=True, help="folder that all nodes share")
    parser.add_argument("--gpus", type=int, required=True, help="that each node has to offer")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds to wait for others")
    parser.add_argument("--rank", type=int, default=int(os.environ.get("SLURM_PROCID", "0")))
    parser.add_argument("overrides", nargs="*", help="the run's own keys, after --")
    known = parser.parse_args()
    place = Place(
        rank=known.rank,
        nodes=known.nodes.split(","),
        port=known.port,
        shared=known.shared,
        timeout_s=known.timeout,
    )
    try:
        config = composed(known.overrides)
    except ValueError as fault:
        print(f"elpo_ray: {fault}", file=sys.stderr)
        return 2
    findings = look(place, config, known.gpus)
    for backend in ("gloo", "nccl") if known.gpus else ("gloo",):
        if len(place.nodes) > 1 or backend == "nccl":
            findings += examine(
                [Check(f"all-reduce, {backend}", partial(all_reduce, place, backend))]
            )
    return conclude(place, findings)


def conclude(place: Place, findings: list[Finding]) -> int:
    """Report; on the first node, wait for the others and write the table."""
    print(f"{place.name} ({socket.gethostname()})", flush=True)
    for finding in findings:
        print_finding(Console(highlight=False), finding)
    gather(place, findings)
    if place.rank:
        return 0  # the first node speaks for all
    write_whole(place.shared / "head", own_address())  # the job's Ray will listen there
    reports, common = wait_for_reports(place)
    if len(place.nodes) > 1:
        common += versions_equal(reports)
    return 0 if table(place, reports, common) else 1


if __name__ == "__main__":
    sys.exit(main())
