"""The linear probe on features that are taken once, against SGD for 100 epochs over the images: mAP and time.

    python examples/benchmarks/probe.py --root FOLDER [--source last.ckpt]

FOLDER contains Corel-5K as `read_corel5k` describes it. Both learn the same linear classifier of the same frozen,
average and maximum pooled features of the same un-augmented images. SGD is the published recipe (weights N(0, 0.01),
BCE, momentum 0.9, no decay, cosine, 64 images a step), its learning rate chosen on the held-out fifth of the training
images, as the probe's strength is.

The backbone is frozen and the images are not augmented, so an epoch over the images gives the classifier the features
that the first one gave. SGD therefore runs all of its 100 epochs here, on features that were kept; the time that the
pass over the images takes was measured once, and is counted 100 times. Neither side is charged for the test images or
for choosing its hyper-parameter: SGD trains once, the probe solves for the strength that it chose and, beside it, for
all the others.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from mlssl import MultiLabelDataModule, extract_features, linear_probe
from mlssl.evaluation.features import Features
from mlssl.evaluation.metrics import mean_average_precision
from mlssl.weights.sources import open_backbone

LEARNING_RATES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""For 256 images a step; the published ones are 1 and 10."""

EPOCHS, BATCH = 100, 64


def train_by_sgd(features: Tensor, labels: Tensor, lr: float, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = (0.01 * torch.randn(labels.shape[1], features.shape[1], generator=generator)).requires_grad_()
    bias = torch.zeros(labels.shape[1], requires_grad=True)
    optimizer = torch.optim.SGD([weight, bias], lr * BATCH / 256, momentum=0.9)
    steps = EPOCHS * -(-len(features) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(features), generator=generator).split(BATCH):
            loss = F.binary_cross_entropy_with_logits(F.linear(features[rows], weight, bias), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return weight.detach(), bias.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--root", required=True)
    parser.add_argument("--source", default="resnet18")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    data = MultiLabelDataModule(
        "corel5k", arguments.root, eval_size=(128, 192), min_images_per_class=(40, 4), batch_size=BATCH
    )
    data.setup()
    model = open_backbone(arguments.source, seed=arguments.seed)

    start = time.perf_counter()
    train: Features = extract_features(model, data.image_dataloader("train"), pooling="avgmax", progress=True)
    one_pass = time.perf_counter() - start
    test = extract_features(model, data.image_dataloader("val"), pooling="avgmax", progress=True)
    assert train.labels is not None
    assert test.labels is not None

    start = time.perf_counter()
    probe = linear_probe(train, test, seed=arguments.seed, num_resamples=0)
    solving = time.perf_counter() - start

    order = torch.randperm(len(train.features), generator=torch.Generator().manual_seed(arguments.seed))
    held, fit = order[: len(order) // 5], order[len(order) // 5 :]
    labels = train.labels.float()
    chosen = {}
    for lr in LEARNING_RATES:
        weight, bias = train_by_sgd(train.features[fit], labels[fit], lr, arguments.seed)
        chosen[lr] = mean_average_precision(F.linear(train.features[held], weight, bias), train.labels[held])[0]
    lr = max(chosen, key=lambda rate: chosen[rate])
    start = time.perf_counter()
    weight, bias = train_by_sgd(train.features, labels, lr, arguments.seed)
    stepping = time.perf_counter() - start
    sgd, _ = mean_average_precision(F.linear(test.features, weight, bias), test.labels)

    once, hundred = one_pass + solving, EPOCHS * one_pass + stepping
    print(f"{arguments.source}, {len(train.features)} images, {test.labels.shape[1]} classes, seed {arguments.seed}")
    print(f"one pass over the training images   {one_pass:8.1f} s")
    print(f"probe: pass + all strengths         {once:8.1f} s   mAP {probe.mAP:.4f}   strength {probe.strength:g}")
    print(f"SGD: {EPOCHS} passes + its steps        {hundred:8.1f} s   mAP {sgd:.4f}   lr {lr:g}")
    print(f"mAP of the probe above SGD's        {probe.mAP - sgd:+.4f}")
    print(f"times faster                        {hundred / once:8.1f}")
    print("mAP on the held-out fifth by learning rate:", {rate: round(value, 4) for rate, value in chosen.items()})


if __name__ == "__main__":
    main()
