"""Published weights by name: detect such names, and load the network."""

from __future__ import annotations

from torch import nn

from mlssl.backbones import TORCHVISION_PREFIX, build_backbone

PRETRAINED = ":pretrained"
"""Suffix of a name: use its library's default weights."""

_SOURCES = ("hf-hub:", "hf_hub:", "local-dir:")
"""Prefixes of sources from which timm reads architecture and weights."""

_MAX_LENGTH = 200


def asks_for_weights(name: str) -> bool:
    """Whether a backbone name specifies published weights.

    >>> [asks_for_weights(name) for name in ("resnet18", "resnet18:pretrained", "resnet18.a1_in1k", "hf-hub:a/b")]
    [False, True, True, True]
    """
    timm_name = not name.startswith(TORCHVISION_PREFIX)
    return name.endswith(PRETRAINED) or (timm_name and (name.startswith(_SOURCES) or "." in name))


def published_backbone(name: str) -> nn.Module:
    """A backbone with the published weights of its name, cached or downloaded by its library.

    Args:
        name: ``NAME:pretrained`` for timm's or torchvision's default weights, timm's ``NAME.TAG``, ``hf-hub:…`` or
            ``local-dir:…``.

    Raises:
        ValueError: The name or tag is unknown, or the weights cannot be loaded; never falls back to an untrained
            network.
    """
    plain = name.removesuffix(PRETRAINED)
    architecture, dot, tag = plain.partition(".")
    if dot and not plain.startswith((TORCHVISION_PREFIX, *_SOURCES)):
        _check_tag(architecture, tag)
    try:
        return build_backbone(plain, pretrained=True)
    except ValueError:
        raise
    except Exception as error:  # timm, torchvision, their hubs and the network raise many types
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = reason if len(reason) <= _MAX_LENGTH else reason[:_MAX_LENGTH] + "…"
        untrained = "" if plain.startswith(_SOURCES) else f", or {architecture} for an untrained network"
        raise ValueError(
            f"the published weights of {name!r} cannot be loaded ({reason}): let this machine download them once, or "
            f"pass their file, {architecture}=FILE{untrained}"
        ) from None


def _check_tag(architecture: str, tag: str) -> None:
    import timm

    if not timm.is_model(architecture):
        return  # build_backbone reports an unknown name with suggestions
    tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")]
    if tag not in tags:
        known = f"its tags are {', '.join(sorted(tags))}" if tags else "it has no published weights"
        raise ValueError(
            f"{architecture!r} has no published weights with the tag {tag!r}, {known}: pass one of these, "
            f"{architecture}=FILE, or {architecture} for an untrained network"
        )
