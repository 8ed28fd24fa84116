"""A custom form of the loss: the decoupled contrastive loss (arXiv 2110.06848), a function of five lines.

python examples/own_loss_form.py --root photos/

With the command, from the folder of this file: `mlssl fit --model.form own_loss_form.decoupled`.
"""

import lightning as L
import torch
from jsonargparse import auto_cli

from mlssl import MultiLabelDataModule, MultiLabelSSLModule


def decoupled(logits: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Leave an anchor's own image out of the denominator: logits (c, M) and weights (c, M) of positives -> (c,)."""
    of_others = logits.masked_fill(weights > 0, -torch.inf).logsumexp(dim=1)
    of_positives = (weights * logits.masked_fill(weights == 0, 0)).sum(dim=1) / weights.sum(dim=1)
    return of_others - of_positives


def main(root: str | None = None, epochs: int = 5, size: int = 64, batch_size: int = 32) -> None:
    """Pre-train under the decoupled form.

    Args:
        root: Folder of photographs; scenes are drawn where it is not given.
        epochs: Passes over the images.
        size: Side of a view in pixels.
        batch_size: Images per step.
    """
    data = MultiLabelDataModule("folder" if root else "synthetic", root, batch_size=batch_size, size=size)
    # A mean of logarithms pulls |P(i)| = 7 times as hard as the paper's form: 4 / 7 keeps the terms in proportion.
    model = MultiLabelSSLModule("resnet18", projection_dim=512, form=decoupled, contrastive_weight=4 / 7)
    trainer = L.Trainer(max_epochs=epochs, logger=False)
    trainer.fit(model, data)
    print(f"loss {trainer.callback_metrics['train/loss']:.3f} under {model.hparams['form']}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
