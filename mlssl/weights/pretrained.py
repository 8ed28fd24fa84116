"""Published weights by name: detect such names, and load the network."""

from __future__ import annotations

from torch import nn

from mlssl.backbones import TORCHVISION_PREFIX, build_backbone

PRETRAINED = ":pretrained"
"""Suffix of a name: use its library's default weights."""

FROM_FILE = "NAME=FILE"
"""A source that is a file of weights: its architecture and its path."""

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
    check_tag(name)
    try:
        return build_backbone(name.removesuffix(PRETRAINED), pretrained=True)
    except ValueError:
        raise
    except Exception as error:  # timm, torchvision, their hubs and the network raise many types
        raise ValueError(why_not_loaded(name, error)) from None


def why_not_loaded(name: str, error: Exception, from_file: str = FROM_FILE) -> str:
    """One sentence on published weights that could not be loaded.

    Args:
        name: That asks for them.
        error: Why.
        from_file: What to write to take them from a file, with ``NAME`` for the architecture.
    """
    plain = name.removesuffix(PRETRAINED)
    architecture = plain if plain.startswith(TORCHVISION_PREFIX) else plain.partition(".")[0]
    said = " ".join(str(error).split()) or type(error).__name__
    said = said if len(said) <= _MAX_LENGTH else said[:_MAX_LENGTH] + "…"
    untrained = "" if plain.startswith(_SOURCES) else f", or {architecture} for an untrained network"
    return (
        f"the published weights of {name!r} cannot be loaded ({said}): let this machine download them once, or "
        f"pass their file, {from_file.replace('NAME', architecture)}{untrained}"
    )


def check_tag(name: str, from_file: str = FROM_FILE) -> None:
    """Refuse the tag of timm's name if there are no published weights of it.

    Args:
        name: With a tag or without.
        from_file: As `why_not_loaded` takes it.

    Raises:
        ValueError: Naming the tags that there are.
    """
    plain = name.removesuffix(PRETRAINED)
    architecture, dot, tag = plain.partition(".")
    if not dot or plain.startswith((TORCHVISION_PREFIX, *_SOURCES)):
        return
    import timm

    if not timm.is_model(architecture):
        return  # build_backbone reports an unknown name with suggestions
    tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")]
    if tag not in tags:
        known = f"its tags are {', '.join(sorted(tags))}: pass one of these" if tags else "nor any others: pass"
        comma = "," if tags else ""
        raise ValueError(
            f"{architecture!r} has no published weights with the tag {tag!r}, {known}{comma} {architecture} for an "
            f"untrained network, or your own file: {from_file.replace('NAME', architecture)}"
        )
