"""A custom method: the pair term predicts a momentum teacher (BYOL, arXiv 2006.07733), as one subclass.

    python examples/momentum_target.py fit --config examples/momentum_target.yaml --data.root photos/

It has run folder, resume, report and exports as `mlssl fit` has. The config probes and exports the teacher.
"""

import sys
from copy import deepcopy

import torch

from mlssl import MultiLabelSSLModule
from mlssl.cli import main


class MomentumTarget(MultiLabelSSLModule):
    """The paper's method whose pair term predicts what an average of earlier weights sees.

    Args:
        backbone: As in MultiLabelSSLModule.
        momentum: Share of the teacher that stays at each step, 0 to 1.
        settings: All others of MultiLabelSSLModule.
    """

    def __init__(self, backbone: str = "resnet18", momentum: float = 0.99, **settings):
        super().__init__(backbone, **settings)
        self.momentum = momentum
        self.teacher = deepcopy(self.backbone).requires_grad_(False)
        self.teacher_projector = deepcopy(self.projector).requires_grad_(False)

    @torch.no_grad()
    def targets(self, embeddings, batch):
        branches = [self.normalize(views.flatten(0, 1)) for views in batch["views"].unbind(1)]
        return [self.teacher_projector(self.teacher(images)) for images in branches]

    @torch.no_grad()
    def on_train_batch_end(self, outputs, batch, batch_idx):
        for teacher, student in ((self.teacher, self.backbone), (self.teacher_projector, self.projector)):
            for average, weight in zip(teacher.parameters(), student.parameters(), strict=True):
                average.lerp_(weight, 1 - self.momentum)


if __name__ == "__main__":
    sys.exit(main(model=MomentumTarget))
