"""`mlssl report`: one page about a run, or about several."""

from __future__ import annotations

from pathlib import Path

from mlssl.choices import Pooling


def report(
    folders: list[Path],
    max_images: int = 2000,
    num_workers: int | None = None,
    output: Path | None = None,
    trust: bool = False,
    eval_size: int | tuple[int, int] | None = None,
    pooling: Pooling = "avgmax",
) -> None:
    """Write one HTML file about a run: verdicts, curves, probe, views, neighbours, a map of its images.

    For several runs: the settings that differ, the curves in one plot, and the quality with intervals.

    Example: mlssl report runs/fit-20250101-120000

    Args:
        folders: Folder of a run, or of several to compare.
        max_images: Maximum number of training images, and of val images, to evaluate.
        num_workers: Loader processes; those of the run by default.
        output: File to write; by default report.html in the run's folder, for several runs compare-<time>.html next
            to the first.
        trust: Also read and download what the run's config names, such as published weights and images at an address.
        eval_size: Side, or height and width, of whole images; that of the (first) run by default.
        pooling: Pooling of their features: avg, max or avgmax (their mean).
    """
    from datetime import datetime
    from typing import Any

    from mlssl.report.compare import write_comparison
    from mlssl.report.run import write_report

    size = (eval_size, eval_size) if isinstance(eval_size, int) else eval_size
    how: dict[str, Any] = {"max_images": max_images, "num_workers": num_workers, "trust": trust}
    how |= {"eval_size": size, "pooling": pooling, "progress": True}
    if len(folders) == 1:
        path = write_report(folders[0], output, **how)
    else:
        comparison_path = folders[0].resolve().parent / f"compare-{datetime.now():%Y%m%d-%H%M%S}.html"
        path = write_comparison(folders, output or comparison_path, **how)
    print(f"{path}: open it in a browser; all pictures are embedded, and no network is needed")
