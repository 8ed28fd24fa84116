"""Everything that docs/performance.md says about a GPU, by one command, in at most nine minutes.

python examples/benchmarks/gpu.py FOLDER -o gpu.json

FOLDER: 200 photographs or more. Needs torch, torchvision, lightning, torchmetrics, timm, opencv-python-headless
and jsonargparse, and this checkout. Each measurement runs in a process of its own with a time limit of its own, so
that one that is slow or fails costs only itself; the results so far are in the file after each. --tiny runs all of
them in small sizes, on a processor too, to try the script. --page docs/performance.md renews the table there.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import ArgumentParser

LIMIT_S = 9 * 60
"""Of everything; what has no time left is not measured."""

LIMITS_S = {
    "step": 120,
    "loss": 60,
    "optimizers": 50,
    "loader": 70,
    "exact": 60,
    "resume": 60,
    "memory": 40,
    "transformer": 40,
    "evaluation": 60,
    "fsdp": 60,
    "compiled": 120,
}
"""Seconds of each, in the order in which they run: what matters most comes first."""

NOT_YET = "not yet measured"
MARKS = "<!-- gpu.json -->", "<!-- end of gpu.json -->"

TINY_LIMITS = 10
"""By which `--tiny` multiplies all limits: a busy processor starts and compiles slowly, and its times are not kept."""

Results = dict[str, dict[str, Any]]


class Row(NamedTuple):
    """A row of the table; `measured` raises KeyError or TypeError where a number is missing."""

    what: str
    expected: str
    measured: Callable[[Results], str]


ROWS = [
    Row(
        "ResNet-50 at 224 px, ours from files, times the author's way",
        "at least 3",
        lambda r: (
            f"{r['step']['ours_files'] / r['step']['author_files']:.1f} "
            f"({r['step']['ours_files']:.0f} and {r['step']['author_files']:.0f} images/s)"
        ),
    ),
    Row(
        "ours, from files of from memory",
        "at least 0.9",
        lambda r: (
            f"{r['step']['ours_files'] / r['step']['ours_memory']:.2f} "
            f"(from memory {r['step']['ours_memory']:.0f} images/s)"
        ),
    ),
    Row(
        "ours, share of peak bfloat16 throughput",
        "",
        lambda r: f"{r['step']['share_of_peak']:.0%} ({r['step']['tflops']:.0f} TFLOP/s)",
    ),
    Row(
        "ours compiled, from memory",
        "",
        lambda r: (
            f"{r['compiled']['ours_memory']:.0f} images/s, "
            f"{r['compiled']['ours_memory'] / r['step']['ours_memory']:.2f} times not compiled"
        ),
    ),
    Row(
        "ViT-S/16 at 224 px, from memory",
        "",
        lambda r: f"{r['transformer']['ours_memory']:.0f} images/s ({r['transformer']['tflops']:.0f} TFLOP/s)",
    ),
    Row(
        "optimizer's share of a step: SGD, AdamW, Muon",
        "",
        lambda r: ", ".join(f"{r['optimizers'][name]:.1%}" for name in ("sgd", "adamw", "muon")),
    ),
    Row(
        "loss, R = 8192, of the plain form", "at most 1.1 of its time, a fifth of its memory", lambda r: _loss(r, 8192)
    ),
    Row("loss, R = 32,768, of the plain form", "fits in 24 GB", lambda r: _loss(r, 32768)),
    Row(
        "SyncBatchNorm, two processes against one: gradients differ by",
        "at most 1e-9 (float64)",
        lambda r: f"{r['exact']['gradient']:.1e}",
    ),
    Row(
        "ViT-S/16 under FSDP on one device",
        "runs",
        lambda r: (
            f"{r['fsdp']['steps']} steps in {r['fsdp']['seconds']:.0f} s with the start, loss {r['fsdp']['loss']:.2f}"
        ),
    ),
    Row(
        "loader, 8 views of 224 px, images/s by workers",
        "more than a step takes",
        lambda r: ", ".join(f"{number}: {rate:.0f}" for number, rate in r["loader"].items() if number.isdigit()),
    ),
    Row("linear probe, 5,000 × 2048, 80 labels: GPU, CPU", "", lambda r: _evaluation(r, "probe")),
    Row("kNN, 5,000 queries and as large a bank: GPU, CPU", "", lambda r: _evaluation(r, "knn")),
    Row(
        "a resumed run ends with the same weights, deterministic algorithms",
        "bit for bit",
        lambda r: f"{'yes' if r['resume']['identical'] else 'NO'}, resumed at step {r['resume']['from_step']}",
    ),
    Row(
        "peak memory of a step of ResNet-50 by images per step",
        "",
        lambda r: ", ".join(f"{number}: {value:.1f} GB" for number, value in r["memory"].items() if number.isdigit()),
    ),
]


def _loss(results: Results, anchors: int) -> str:
    found = results["loss"]
    ours = f"{1000 * found[f'ours_{anchors}_s']:.0f} ms, {found[f'ours_{anchors}_MB']:.0f} MB"
    if found[f"plain_{anchors}_s"] is None:
        return f"{ours}; the plain form does not fit"
    of_time, of_memory = (found[f"ours_{anchors}_{unit}"] / found[f"plain_{anchors}_{unit}"] for unit in ("s", "MB"))
    return f"{of_time:.2f} of the time, {of_memory:.2f} of the memory ({ours})"


def _evaluation(results: Results, what: str) -> str:
    return ", ".join(f"{results['evaluation'][f'{what}_{device}_s']:.2f} s" for device in ("cuda", "cpu"))


def table(results: Results) -> str:
    """The results as a Markdown table, with what was measured on above it."""
    lines = []
    if results:
        machine = results["machine"]
        lines += [
            f"Measured on {machine['date']}: {machine['device']}, {machine['cores']} cores, torch {machine['torch']}.",
            "",
        ]
    lines += ["| what | expected | measured |", "|---|---|---|"]
    for row in ROWS:
        try:
            measured = row.measured(results) or NOT_YET
        except (KeyError, TypeError):
            measured = NOT_YET
        lines.append(f"| {row.what} | {row.expected} | {measured} |")
    return "\n".join(lines)


def renew(page: Path, results: Results) -> None:
    """Put the table between the marks of a page."""
    before, rest = page.read_text().split(MARKS[0])
    page.write_text(f"{before}{MARKS[0]}\n{table(results)}\n{MARKS[1]}{rest.split(MARKS[1])[1]}")


def measure(name: str, folder: Path, tiny: bool) -> dict[str, Any]:
    """One measurement in this process."""
    import gpu_measurements

    began = time.perf_counter()
    try:
        found = getattr(gpu_measurements, name)(gpu_measurements.Setup(folder, tiny))
    except gpu_measurements.NeedsGPUError as error:
        return {"left_out": str(error)}
    return {**found, "took_s": round(time.perf_counter() - began, 1)}


def measure_apart(name: str, folder: Path, tiny: bool, limit_s: float) -> dict[str, Any]:
    """One measurement in a process of its own, which is killed after `limit_s` seconds."""
    words = [sys.executable, __file__, str(folder), "--only", name, *(["--tiny"] if tiny else [])]
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # deterministic algorithms ask for it
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=limit_s, env=environment)
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {limit_s:.0f} s"}
    if done.returncode:
        return {"failed": (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def machine() -> dict[str, Any]:
    """What was measured on."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"device": device, "cores": os.cpu_count(), "torch": torch.__version__, "date": date.today().isoformat()}


def main(argv: list[str] | None = None) -> int:
    """Measure, print a line each, write the file."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of photographs")
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu.json"))
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script")
    parser.add_argument("--only", help="print one measurement as JSON")
    parser.add_argument("--page", type=Path, help="Markdown page whose table is renewed")
    given = parser.parse_args(argv)
    if not given.folder.is_dir():
        parser.error(f"{given.folder} is not a folder: pass one that holds photographs")
    if given.only and given.only not in LIMITS_S:
        parser.error(f"--only {given.only} is unknown: choose {', '.join(LIMITS_S)}")
    if given.only:
        print(json.dumps(measure(given.only, given.folder, given.tiny)))
        return 0
    results: Results = {"machine": machine()}
    began, times = time.monotonic(), TINY_LIMITS if given.tiny else 1
    for name, limit_s in LIMITS_S.items():
        left = LIMIT_S * times - (time.monotonic() - began)
        results[name] = (
            measure_apart(name, given.folder, given.tiny, min(limit_s * times, left))
            if left > 5
            else {"failed": "no time left"}
        )
        given.output.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{time.monotonic() - began:4.0f} s  {name}: {json.dumps(results[name])}", flush=True)
    print(f"\n{table(results)}")
    if given.page:
        renew(given.page, results)
    return int(any("failed" in found for found in results.values()))


if __name__ == "__main__":
    sys.exit(main())
