"""torchvision's Faster and Mask R-CNN on a timm backbone, with a pyramid (FPN) or with the last stage as head (C4)."""

from typing import Any

from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from mlssl.backbones import build_backbone, pixel_statistics
from mlssl.weights.sources import open_backbone

SCRATCH = "scratch"
RATIOS = (0.5, 1.0, 2.0)


def build_detector(
    backbone: str, weights: str, num_classes: int, head: str, with_masks: bool, **sizes: Any
) -> nn.Module:
    """A detector whose backbone has the weights of a file, and everything else fresh ones; all of it is trained.

    Args:
        backbone: Any timm name with stages for "fpn", a ResNet for "c4".
        weights: "scratch", or a weights file of timm, strictly loaded but for a classifier.
        num_classes: Without the background.
        head: "fpn" or "c4".
        with_masks: Mask R-CNN instead of Faster R-CNN.
        **sizes: Of images and samples, such as min_size, as torchvision's detectors take them.
    """
    if weights == SCRATCH:
        network = build_backbone(backbone)
    else:
        network = open_backbone(f"{backbone}={weights}").backbone.requires_grad_(True).train()
    mean, std = pixel_statistics(network)
    parts = fpn_parts(network, num_classes + 1) if head == "fpn" else c4_parts(network, num_classes + 1, with_masks)
    return (MaskRCNN if with_masks else FasterRCNN)(**parts, image_mean=mean, image_std=std, **sizes)


class Pyramid(nn.Module):
    """Maps of four stages, and of a fifth half as large, each 256 channels wide."""

    def __init__(self, network: nn.Module, out_channels: int = 256) -> None:
        super().__init__()
        self.body = network
        channels = [one["num_chs"] for one in network.feature_info][-4:]
        # New layers among pre-trained ones get a norm, without which training from scratch fails.
        self.fpn = FeaturePyramidNetwork(channels, out_channels, LastLevelMaxPool(), norm_layer=nn.BatchNorm2d)
        self.out_channels = out_channels

    def forward(self, images):
        maps = self.body.forward_intermediates(images, indices=4, intermediates_only=True)
        return self.fpn({str(place): one for place, one in enumerate(maps)})


def fpn_parts(network: nn.Module, num_classes: int) -> dict:
    anchors = AnchorGenerator(tuple((size,) for size in (32, 64, 128, 256, 512)), (RATIOS,) * 5)
    return {"backbone": Pyramid(network), "rpn_anchor_generator": anchors, "num_classes": num_classes}


class C4(nn.Module):
    """One map of a ResNet's third stage, at a sixteenth of the image."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        names = ("conv1", "bn1", "act1", "maxpool", "layer1", "layer2", "layer3")
        self.body = nn.Sequential(*(getattr(network, name) for name in names))
        self.out_channels = network.feature_info[-2]["num_chs"]

    def forward(self, images):
        return self.body(images)


def c4_parts(network: nn.Module, num_classes: int, with_masks: bool) -> dict:
    """The last stage processes each region, and a norm behind it gives pre-trained features one scale."""
    if not hasattr(network, "layer4"):
        raise ValueError(f"head c4 takes a ResNet apart, and {type(network).__name__} is none: use head fpn.")
    body, width = C4(network), network.num_features
    head = nn.Sequential(network.layer4, nn.BatchNorm2d(width), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    parts = {
        "backbone": body,
        "rpn_anchor_generator": AnchorGenerator(((32, 64, 128, 256, 512),), (RATIOS,)),
        "box_roi_pool": MultiScaleRoIAlign(["0"], output_size=14, sampling_ratio=0),
        "box_head": head,
        "box_predictor": FastRCNNPredictor(width, num_classes),
    }
    if with_masks:
        parts["mask_roi_pool"] = MultiScaleRoIAlign(["0"], output_size=14, sampling_ratio=0)
        parts["mask_head"] = MaskRCNNHeads(body.out_channels, (256,) * 4, dilation=1)
        parts["mask_predictor"] = MaskRCNNPredictor(256, 256, num_classes)
    return parts
