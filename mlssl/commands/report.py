"""`mlssl report`: one page about a run."""

from __future__ import annotations

from pathlib import Path


def report(
    run: Path,
    max_images: int = 2000,
    num_workers: int | None = None,
    output: Path | None = None,
    trust: bool = False,
) -> None:
    """Write one HTML file about a run: verdicts, curves, probe, views, neighbours, a map of its images.

    Example: mlssl report runs/fit-20250101-120000

    Args:
        run: Folder of the run.
        max_images: Training and val images that are looked at, at most.
        num_workers: Loader processes; those of the run by default.
        output: File to write; report.html in the run's folder by default.
        trust: Also read and download what the run's config names, such as published weights and images at an address.
    """
    from mlssl.report.run import write_report

    path = write_report(run, output, max_images=max_images, num_workers=num_workers, progress=True, trust=trust)
    print(f"{path}: open it in a browser; it holds all its pictures and needs no network")
