"""The few names of Detectron2 that an export and its bundle use, in a package of files, each where the real one has it.

Places and behaviors are those of Detectron2 0.6: the names in its `__init__.py` files, `build_resnet_backbone` and its
blocks, configs that refuse an unknown key and a value of another type, and the FutureWarning of its import.
"""

from pathlib import Path

_LAYERS = """
from torch import nn

class ShapeSpec:
    def __init__(self, *, channels):
        self.channels = channels

def get_norm(norm, out_channels):
    return {"BN": nn.BatchNorm2d, "SyncBN": nn.SyncBatchNorm, "naiveSyncBN": nn.BatchNorm2d}[norm](out_channels)
"""

_CONFIG = """
class CfgNode(dict):
    def merge_from_list(self, words):
        for name, value in zip(words[::2], words[1::2], strict=True):
            if name not in self:
                raise KeyError(f"Non-existent key: {name}")
            if type(value) is not type(self[name]):
                raise ValueError(f"Type mismatch for key: {name}")
            self[name] = value

def get_cfg():
    resnets = {"DEPTH": 50, "NUM_GROUPS": 1, "WIDTH_PER_GROUP": 64, "RES2_OUT_CHANNELS": 256, "STRIDE_IN_1X1": True,
               "NORM": "FrozenBN", "OUT_FEATURES": ["res4"]}
    named = {f"MODEL.RESNETS.{name}": value for name, value in resnets.items()}
    return CfgNode(named | {"MODEL.BACKBONE.FREEZE_AT": 2})
"""

_BACKBONE = """
import warnings
from torch import nn
from torch.nn import functional as F
from detectron2.layers import get_norm

warnings.warn("`torch.cuda.amp.autocast(args...)` is deprecated.", FutureWarning)

class Conv2d(nn.Conv2d):
    def __init__(self, given, out, side, stride=1, groups=1):
        super().__init__(given, out, side, stride, side // 2, groups=groups, bias=False)
        self.norm = get_norm("BN", out)

    def forward(self, images):
        return self.norm(super().forward(images))

class Block(nn.Module):
    def __init__(self, given, out, convs, stride):
        super().__init__()
        self.shortcut = Conv2d(given, out, 1, stride) if given != out else None
        for number, conv in enumerate(convs, start=1):
            self.add_module(f"conv{number}", conv)
        self.number = len(convs)

    def forward(self, images):
        maps = images
        for number in range(1, self.number + 1):
            maps = getattr(self, f"conv{number}")(maps if number == 1 else F.relu(maps))
        return F.relu(maps + (images if self.shortcut is None else self.shortcut(images)))

class Stem(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = Conv2d(channels, 64, 7, 2)

    def forward(self, images):
        return F.max_pool2d(F.relu(self.conv1(images)), 3, 2, 1)

class ResNet(nn.Module):
    def __init__(self, cfg, channels):
        super().__init__()
        of = lambda name: cfg[f"MODEL.RESNETS.{name}"]
        assert of("STRIDE_IN_1X1") is False and of("NORM") == "BN" and of("OUT_FEATURES") == ["res5"]
        assert of("DEPTH") >= 50 or of("RES2_OUT_CHANNELS") == 64, "Must set MODEL.RESNETS.RES2_OUT_CHANNELS = 64"
        blocks = {18: [2, 2, 2, 2], 34: [3, 4, 6, 3], 50: [3, 4, 6, 3], 101: [3, 4, 23, 3], 152: [3, 8, 36, 3]}
        self.stem, given, out = Stem(channels), 64, of("RES2_OUT_CHANNELS")
        middle = of("NUM_GROUPS") * of("WIDTH_PER_GROUP")
        for stage, number in enumerate(blocks[of("DEPTH")]):
            layers = []
            for block in range(number):
                stride = 2 if stage and not block else 1
                spatial = Conv2d(middle, middle, 3, stride, of("NUM_GROUPS"))
                convs = [Conv2d(given, middle, 1), spatial, Conv2d(middle, out, 1)]
                if of("DEPTH") < 50:
                    convs = [Conv2d(given, out, 3, stride), Conv2d(out, out, 3)]
                layers.append(Block(given, out, convs, stride))
                given = out
            self.add_module(f"res{stage + 2}", nn.Sequential(*layers))
            out, middle = 2 * out, 2 * middle

    def forward(self, images):
        return {"res5": self.res5(self.res4(self.res3(self.res2(self.stem(images)))))}

def build_resnet_backbone(cfg, input_shape):
    return ResNet(cfg, input_shape.channels)
"""

_ROI_HEADS = """
from torch import nn

class Registry(dict):
    def register(self):
        def registered(one):
            assert one.__name__ not in self, f"An object named {one.__name__!r} was already registered"
            self[one.__name__] = one
            return one
        return registered

ROI_HEADS_REGISTRY = Registry()

@ROI_HEADS_REGISTRY.register()
class Res5ROIHeads(nn.Module):
    def __init__(self, cfg, input_shape):
        super().__init__()
        self.res5 = nn.Conv2d(4, 8 * cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, 1)

    def _shared_roi_transform(self, features, boxes):
        return self.res5(features[0])
"""

_ENGINE = '''
import argparse

class DefaultTrainer:
    """Builds the head that the config names, as the real one does."""

    def __init__(self, cfg):
        from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY
        self.head = ROI_HEADS_REGISTRY.get(cfg.MODEL.ROI_HEADS.NAME)

    def resume_or_load(self, resume=True):
        pass

    def train(self):
        return self.head and self.head.__name__

def default_argument_parser(epilog=None):
    return argparse.ArgumentParser()

def default_setup(cfg, args):
    pass

def launch(main_func, num_gpus_per_machine, num_machines=1, machine_rank=0, dist_url=None, args=()):
    pass
'''

FILES = {
    "__init__": "",
    "checkpoint/__init__": "class DetectionCheckpointer: ...",
    "config/__init__": _CONFIG,
    "data/__init__": "class MetadataCatalog: ...",
    "engine/__init__": _ENGINE,
    "evaluation/__init__": "class COCOEvaluator: ...\nclass PascalVOCDetectionEvaluator: ...",
    "layers/__init__": _LAYERS,
    "modeling/__init__": "from .backbone import build_resnet_backbone\nfrom .roi_heads import ROI_HEADS_REGISTRY",
    "modeling/backbone/__init__": _BACKBONE,
    "modeling/roi_heads/__init__": _ROI_HEADS,
}
"""File of the package → its text. Detectron2's `modeling` does not pass `Res5ROIHeads` on."""


def write(folder: Path) -> None:
    for name, text in FILES.items():
        file = folder / "detectron2" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
