"""The method in a plain PyTorch loop, without Lightning: views, backbone, heads and the two losses.

`python examples/plain_pytorch.py`
"""

import torch
from jsonargparse import auto_cli
from torch.utils.data import DataLoader

from mlssl.backbones import build_backbone, feature_width, pixel_statistics
from mlssl.data.datasets import EpochSampler, ViewDataset
from mlssl.data.readers.synthetic import synthetic_scenes
from mlssl.heads import predictor, projector
from mlssl.losses import image_aware_contrastive_loss, negative_cosine_similarity
from mlssl.optim import cosine_with_warmup, scaled_lr
from mlssl.views.blocks import BlockViews


def main(count: int = 512, epochs: int = 2, batch_size: int = 32, size: int = 32) -> float:
    """Train a ResNet-18 and give the loss of the last step.

    Args:
        count: Scenes.
        epochs: Passes over them.
        batch_size: Images a step.
        size: Side of a view in pixels.
    """
    torch.manual_seed(0)
    dataset = ViewDataset(synthetic_scenes("train", count=count), BlockViews(size, rows=2, cols=2, overlap=0.2))
    sampler = EpochSampler(dataset, num_replicas=1, rank=0)
    loader = DataLoader(dataset, batch_size, sampler=sampler, drop_last=True)

    backbone = build_backbone("resnet18")
    project = projector(feature_width(backbone), 512)
    predict = predictor(512, 128)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in pixel_statistics(backbone))
    parameters = [p for part in (backbone, project, predict) for p in part.parameters()]
    lr = scaled_lr(0.05, batch_size * dataset.num_blocks)
    optimizer = torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine_with_warmup(epochs * len(loader)))

    loss = torch.zeros(())
    for epoch in range(epochs):
        sampler.set_epoch(epoch)  # the draws of a view depend on seed, epoch and index alone
        for batch in loader:
            views = batch["views"]  # uint8 (B, 2, K, 3, S, S)
            view_ids = batch["image_ids"].repeat_interleave(dataset.num_blocks)
            z, p = [], []
            for branch in (0, 1):  # each on its own: batch norm sees one branch at a time
                pixels = (views[:, branch].flatten(0, 1) / 255 - mean) / std
                z.append(project(backbone(pixels)))
                p.append(predict(z[-1]))
            pair = 0.5 * (negative_cosine_similarity(p[0], z[1]) + negative_cosine_similarity(p[1], z[0]))
            ids = torch.cat([view_ids, view_ids])
            image_aware = 0.5 * sum(
                image_aware_contrastive_loss(torch.cat(pair_of_sets), ids)
                for pair_of_sets in ((p[0], z[1]), (p[1], z[0]))
            )
            loss = pair + 4 * image_aware
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch}: loss {loss.item():.3f}")
    return loss.item()


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
