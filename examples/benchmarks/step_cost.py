"""What a step costs, by network and size of a view: seconds and memory per image, seconds of an update.

python examples/benchmarks/step_cost.py --networks '[resnet18, resnet50]' --size 64

The optimizers are SGD of the recipe `paper` and Muon of `mlssl`; an update costs the same for any number of images.
An image is 2 × 2 blocks, each twice, of random pixels: loading is not counted. On a GPU if there is one, else on the
processor in one thread. Seconds are the median of some steps of the larger of two batches; memory is what the forward
pass keeps for the backward pass, by the difference of the two batches, so that weights are not in it.
"""

import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import Tensor

from mlssl import MultiLabelSSLModule, recipe
from mlssl.optim import build_optimizer, parameter_groups

BLOCKS = 4
RECIPES = ("paper", "mlssl")


def main(
    networks: list[str] = ["resnet18"],  # noqa: B006  a parser reads it, nobody writes to it
    size: int = 64,
    batch_size: int = 4,
    steps: int = 3,
    projection_dim: int = 512,
    predictor_dim: int = 128,
) -> None:
    """Print a row per network.

    Args:
        networks: Any backbones.
        size: Side of a view.
        batch_size: Images of the larger batch, at least 4; the smaller has half of them.
        steps: That count, after one that does not.
        projection_dim: P.
        predictor_dim: Width of the predictor's bottleneck.
    """
    warnings.filterwarnings("ignore", "You are trying to `self.log")  # there is no Trainer
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else "one thread"
    print(f"{where}, torch {torch.__version__}, float32, {2 * BLOCKS} views per image\n")
    columns = ["network, view", "seconds per image", "MB per image"]
    columns += [f"seconds per update, `{one}`" for one in RECIPES]
    print(f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", sep="\n")
    for name in networks:
        module = MultiLabelSSLModule(name, projection_dim=projection_dim, predictor_dim=predictor_dim).to(device)
        module.train()
        small, large = (batch_of(images, size, device) for images in (batch_size // 2, batch_size))
        memory = (kept_bytes(module, large) - kept_bytes(module, small)) / (batch_size - batch_size // 2)
        seconds = [step(module, large) for _ in range(steps + 1)][1:]
        cells = [f"{name}, {size} pixels", f"{median(seconds) / batch_size:.3g}", f"{memory / 1e6:.3g}"]
        cells += [f"{median(update(module, recipe(one)['model'], steps)):.3g}" for one in RECIPES]
        print(f"| {' | '.join(cells)} |", flush=True)


def batch_of(images: int, size: int, device: torch.device) -> dict[str, Tensor]:
    views = torch.randint(0, 256, (images, 2, BLOCKS, 3, size, size), dtype=torch.uint8, device=device)
    return {"views": views, "image_ids": torch.arange(images, device=device)}


def step(module: MultiLabelSSLModule, batch: dict[str, Tensor]) -> float:
    """Seconds of a forward and a backward pass."""
    seconds = timed(lambda: module.training_step(batch, 0)["loss"].backward())
    module.zero_grad()
    return seconds


def update(module: MultiLabelSSLModule, settings: dict[str, Any], steps: int) -> list[float]:
    """Seconds of each update of all weights by the optimizer of a recipe."""
    groups = parameter_groups(module.parameters(), settings["weight_decay"])
    name, arguments = settings.get("optimizer", "sgd"), settings.get("optimizer_kwargs")
    optimizer = build_optimizer(name, groups, 1e-6, arguments, fused=True)
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    seconds = [timed(optimizer.step) for _ in range(steps + 1)][1:]
    module.zero_grad()
    return seconds


def timed(work: Callable[[], object]) -> float:
    """Seconds of the processor, or on the clock until a GPU has finished."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    start = clock()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


def kept_bytes(module: MultiLabelSSLModule, batch: dict[str, Tensor]) -> int:
    """Bytes of the tensors that the forward pass keeps, each storage once."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = module.training_step(batch, 0)["loss"]
    found = sum(kept.values())
    del loss
    return found


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
