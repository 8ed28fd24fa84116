"""The model card of an export: README.md in the Hugging Face Hub's layout."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

CARD = "README.md"
LICENSE = "license"
"""Metadata entry with the licence of the weights, a Hub identifier such as "cc0-1.0"."""

_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_NOT_STATED = "Not stated: add it here, and `license:` at the top, before you share this folder."


def model_card(header: Mapping[str, str], classes: Sequence[str] = ()) -> str:
    """Text of a card: licence, loading, recipe, data and metrics, as far as the header has them.

    Args:
        header: Header of an exported file, with "license" if the user passed it as metadata.
        classes: Names of the classifier's outputs, if it has one.

    >>> "num_classes=5" in model_card({"backbone": "resnet18", "library": "mlssl 1", "features": "512"})
    True
    """
    stated = header.get(LICENSE)
    parts = [
        "\n".join(["---", "library_name: timm", *_license_lines(stated), *(_LABELLING if classes else _TAGS), "---"]),
        *(_of_classifier(header, classes) if classes else _of_backbone(header)),
        "## Licence",
        stated or _NOT_STATED,
        "## Recipe",
        f"{header['steps']} optimizer steps." if "steps" in header else "The source of this export names no run.",
        _table(header.get("model"), "setting"),
        "## Data",
        _table(header.get("data"), "setting") or "Not named by the source of this export.",
        "Images are RGB, scaled to 0–1 and normalized by the mean "
        f"{header.get('mean', 'in config.json')} and the standard deviation {header.get('std', 'in config.json')}.",
        "## Metrics",
        _table(header.get("metrics"), "metric, last logged value") or "None were logged.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


_TAGS = ("pipeline_tag: image-feature-extraction", "tags:", "- timm", "- self-supervised-learning", "- multi-label")

_LABELLING = ("pipeline_tag: image-classification", "tags:", "- timm", "- multi-label")


def _of_backbone(header: Mapping[str, str]) -> list[str]:
    return [
        f"# {header['backbone']}, pre-trained without labels",
        f"A backbone for images that show several things at once, {header['features']} features wide, trained and "
        f"exported with {header['library']}. It has no classifier.",
        _LOADING,
    ]


def _of_classifier(header: Mapping[str, str], classes: Sequence[str]) -> list[str]:
    return [
        f"# {header['backbone']} for {len(classes)} labels",
        f"A network that names everything an image shows, exported with {header['library']}. The sigmoid of an output "
        "is the probability of a label: one image may have several labels, or none. `config.json` contains their names "
        "(`label_names`) and, under `mlssl`, the threshold of each probability and the size of the images.",
        _LOADING_CLASSIFIER,
        "## Labels",
        ", ".join(map(_cell, classes)),
    ]


_LOADING = """## How to load

```python
import timm

features = timm.create_model("local-dir:FOLDER", pretrained=True, num_classes=0)    # images to features
classifier = timm.create_model("local-dir:FOLDER", pretrained=True, num_classes=5)  # a new head for five classes
```

For the Hub, use `hf-hub:USER/NAME` instead of `local-dir:FOLDER`. Without `pretrained=True` timm silently keeps
random weights. `timm.data.resolve_model_data_config(features)` returns size, mean and standard deviation."""

_LOADING_CLASSIFIER = """## How to load

```python
import timm

network = timm.create_model("local-dir:FOLDER", pretrained=True)
names = network.pretrained_cfg["label_names"]  # of the outputs
probabilities = network(images).sigmoid()      # images normalized as below
```

From the Hub, `hf-hub:USER/NAME` takes the place of `local-dir:FOLDER`. Without `pretrained=True` timm keeps random
weights and does not say so. `num_classes=5` puts in a new head for five classes, `num_classes=0` gives features."""


def _license_lines(stated: str | None) -> list[str]:
    if stated is None:
        return ["license: unknown"]
    if _IDENTIFIER.fullmatch(stated):
        return [f"license: {stated}"]
    return ["license: other", f"license_name: {json.dumps(stated, ensure_ascii=False)}"]


def _table(entry: str | None, name: str) -> str:
    """Markdown table of a JSON object; empty for a missing entry."""
    if entry is None:
        return ""
    lines = [
        f"| {_cell(key)} | {_cell(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))} |"
        for key, value in json.loads(entry).items()
        if value is not None
    ]
    return "\n".join([f"| {name} | |", "|---|---|", *lines]) if lines else ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
