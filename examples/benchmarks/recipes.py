"""One trial of a recipe or of a peer: pre-train, score, and add a row to recipes.jsonl.

python examples/benchmarks/recipes.py mlssl --set corel5k --root FOLDER --seed 0 --views 40

NAME is `mlssl` or `paper`, the library's recipes with the blocks and heads of time_to_quality.py; `soft`, the paper's
with the colours of `mlssl`; `sets`, `mlssl` with the terms of recipes_own.py; or a peer of recipes_peers.py
(pip install 'mlssl[bench]'). --change model.base_lr=0.004 changes single settings. FOLDER contains Corel-5K, or
UC Merced's train.csv and test.csv with 17 labels. An
interrupted trial resumes from its last checkpoint when you give the same command, and one with a row is not run again.

The score is a cross-validation inside the training images. Only --final uses the test images: once, at the end.
--page docs/which_recipe.md renews the table there and trains nothing.
"""

import argparse
import hashlib
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from time_to_quality import GRID, NETWORK, Clock

from mlssl import MultiLabelDataModule, MultiLabelSSLModule, recipe
from mlssl.atomic import written_aside
from mlssl.callbacks import RandomState, RunBar, SmallMaps
from mlssl.checkpoint import AtomicCheckpointIO, RunCheckpoint
from mlssl.runs import default_precision

RESULTS = Path(__file__).with_name("recipes.jsonl")
OURS = ("mlssl", "paper", "soft", "sets")
BASE = {"soft": "paper", "sets": "mlssl"}
PEERS = ("simclr", "mocov2", "simsiam", "byol", "barlow", "vicreg", "dino", "swav")
SIZE = 64
SETS: dict[str, dict[str, Any]] = {
    "corel5k": {"dataset": "corel5k", "eval_size": (128, 192), "min_images_per_class": (40, 4)},
    "ucmerced": {"dataset": "manifest", "eval_size": 160, "train_split": "train.csv", "val_split": "test.csv"},
}
"""How each is read: all 81 words with 40 training pictures, and the split of the manifests."""

SOFT = {"corel5k": "soft", "ucmerced": "overhead"}
"""Softer colours, for aerial images with flips and turns."""

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "optimizer_kwargs": {}, "base_lr": 0.06, "warmup_epochs": 0.5},
    "lars": {
        "optimizer": "lars",
        "optimizer_kwargs": {"trust_coeff": 0.02, "trust_clip": True},
        "base_lr": 0.3,
        "warmup_epochs": 0.5,
    },
    "adamw": {"optimizer": "adamw", "optimizer_kwargs": {}, "base_lr": 1e-3, "warmup_epochs": 0.5},
    "muon": {
        name: recipe("mlssl")["model"][name] for name in ("optimizer", "optimizer_kwargs", "base_lr", "warmup_epochs")
    },
}
"""Where the search of each begins; rates are for 256 views of one branch per step."""

BATCH = {"swav": 128, "dino": 128}
"""Images per step, with about 512 views of 64 × 64 as ours have; of the other peers 256."""


class Seconds(L.Callback):
    """Seconds of the training steps, over all processes that a trial took."""

    def __init__(self) -> None:
        self.clock = Clock()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.clock.start()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.clock.stop()

    def state_dict(self) -> dict[str, float]:
        self.clock.stop()
        self.clock.start()
        return {"wall": self.clock.wall, "processor": self.clock.processor}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.clock.wall, self.clock.processor = state_dict["wall"], state_dict["processor"]


def settings_of(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Arguments of the data module and of the module, plain values alone.

    Raises:
        SystemExit: If a change names no part, or colours are asked for a recipe of ours.
    """
    if args.name in OURS:
        settings = recipe(BASE.get(args.name, args.name))
        settings["data"] |= {**GRID, "batch_size": args.batch_size or 64}
        if args.name != "paper":
            settings["data"]["branches"] = SOFT[args.set]
        if args.colours:
            raise SystemExit(
                f"--colours is for peers: pass 'soft', 'paper' or --change data.branches, not {args.name!r}"
            )
    else:
        from recipes_peers import COLOURS, LOCAL_AREA, LOCAL_VIEWS, MULTI_CROP

        own = [vars(one) for one in COLOURS[args.name]]
        colours = own if args.colours == "own" else SOFT[args.set]
        settings = {
            "data": {
                "rows": 1,
                "cols": 1,
                "branches": colours,
                "batch_size": args.batch_size or BATCH.get(args.name, 256),
            },
            "model": {"weight_decay": 1e-4, **OPTIMIZERS["sgd"]},
        }
        if args.name in MULTI_CROP:
            settings["data"]["local_views"] = LOCAL_VIEWS | {"area": LOCAL_AREA[args.colours or "soft"]}
    settings["data"] |= {"size": SIZE, "seed": args.seed, "num_workers": 0}
    settings["model"] |= NETWORK
    settings["model"] |= OPTIMIZERS.get(args.optimizer, {})
    if args.lr:
        settings["model"]["base_lr"] = args.lr
    for change in args.change:
        part, _, rest = change.partition(".")
        key, equals, value = rest.partition("=")
        if part not in ("data", "model") or not equals:
            raise SystemExit(
                f"--change {change!r}: pass data.NAME=VALUE or model.NAME=VALUE, such as model.base_lr=0.004"
            )
        settings[part][key] = yaml.safe_load(value)
    return {part: settings[part] for part in ("data", "model")}


def views_per_image(data: dict[str, Any], has_teacher: bool) -> float:
    """Views of 64 × 64 pixels that an image costs in one epoch; a forward pass without gradient costs a third."""
    full = 2 * data["rows"] * data["cols"] * (data["size"] / SIZE) ** 2
    local = data.get("local_views") or {"count": 0, "size": 0}
    return full * (4 / 3 if has_teacher else 1) + local["count"] * (local["size"] / SIZE) ** 2


def network_of(name: str, settings: dict[str, Any]) -> MultiLabelSSLModule:
    if name == "sets":
        from recipes_own import SetsOfBlocks

        return SetsOfBlocks(**settings)
    if name in OURS:
        return MultiLabelSSLModule(**settings)
    from recipes_peers import PEERS as CLASSES

    return CLASSES[name](**settings)


def train(
    network: MultiLabelSSLModule, data: MultiLabelDataModule, steps: int, folder: Path, save_every: int
) -> dict[str, float]:
    """Train to the end, from the last checkpoint if there is one; gives the seconds that it took in all."""
    trained, last = folder / "trained.ckpt", folder / "last.ckpt"
    if not trained.exists():
        saver = RunCheckpoint(folder, filename="{step}", every_n_train_steps=save_every, save_last=True)
        trainer = L.Trainer(
            max_steps=steps,
            max_epochs=-1,
            default_root_dir=folder,
            precision=default_precision(),
            callbacks=[saver, Seconds(), SmallMaps(), RandomState(), RunBar()],
            plugins=[AtomicCheckpointIO()],
            limit_val_batches=0,
            logger=False,
            enable_model_summary=False,
        )
        trainer.fit(network, data, ckpt_path=last if last.exists() else None)
        if trainer.global_step < steps:
            raise SystemExit(f"stopped at step {trainer.global_step} of {steps}: give the same command to go on")
        trainer.save_checkpoint(trained)
    state = torch.load(trained, map_location="cpu", weights_only=True)
    network.load_state_dict(state["state_dict"])
    return next(of for name, of in state["callbacks"].items() if name.startswith("Seconds"))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def add(path: Path, row: dict[str, Any]) -> None:
    """Add a line; the file is whole at any time."""
    lines = [json.dumps(one) for one in [*rows_of(path), row]]
    with written_aside(path) as aside:
        aside.write_text("\n".join(lines) + "\n")


def processor() -> str:
    info = Path("/proc/cpuinfo")
    named = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return named[0].partition(":")[2].strip() if named else platform.processor()


def trial(args: argparse.Namespace) -> dict[str, Any]:
    """The row of a trial, from the results or by running it."""
    settings = settings_of(args)
    asked = {"name": args.name, "set": args.set, "seed": args.seed, "views": args.views, "settings": settings}
    asked = json.loads(json.dumps(asked))  # tuples as lists, as the file has them
    for row in rows_of(args.results):
        if all(row.get(key) == value for key, value in asked.items()) and (not args.final or "test_average" in row):
            print("done before:", json.dumps(row))
            return row
    L.seed_everything(args.seed)
    data = MultiLabelDataModule(root=args.root, **SETS[args.set] | settings["data"])
    data.setup()
    network = network_of(args.name, settings["model"])
    cost = views_per_image({"rows": 2, "cols": 2, **settings["data"]}, getattr(network, "has_teacher", False))
    images, batch = len(data.train_records), settings["data"]["batch_size"]
    steps = max(1, round(args.views * images / (cost * batch)))
    key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]
    folder = args.work / f"{args.name}-{args.set}-{args.seed}-{key}"
    seconds = train(network, data, steps, folder, args.save_every)
    given = ("batch_size", "colours", "optimizer", "lr", "change")
    row = {
        **asked,
        "changed": {name: getattr(args, name) for name in given if getattr(args, name)},
        "steps": steps,
        "views_per_image": round(steps * batch * cost / images, 2),
        "classes": len(data.classes),
        "wall_s": round(seconds["wall"], 1),
        "processor_s": round(seconds["processor"], 1),
        "versions": {name: version(name) for name in ("torch", "timm", "mlssl")},
        "processor": processor(),
        "precision": default_precision(),
    }
    from recipes_score import cross_validated, tested

    row |= cross_validated(network, data)
    if args.final:
        row |= tested(network, data)
    add(args.results, row)
    print(json.dumps(row))
    return row


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=[*OURS, *PEERS], help="recipe or peer")
    parser.add_argument("--set", choices=list(SETS), default="corel5k")
    parser.add_argument("--root", type=Path, help="folder of the set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--views", type=float, default=40, help="views of 64 × 64 per training image, forward and backward"
    )
    parser.add_argument("--batch_size", type=int, help="images per step")
    parser.add_argument("--colours", choices=["own", "soft"], help="of a peer: its authors', or ours")
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), help="default: the recipe's; SGD for peers")
    parser.add_argument("--lr", type=float, help="for 256 views of one branch per step")
    parser.add_argument("--change", nargs="*", default=[], metavar="PART.NAME=VALUE", help="single settings")
    parser.add_argument("--final", action="store_true", help="look at the test images too")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path("runs/recipes"), help="folder of the checkpoints")
    parser.add_argument("--save_every", type=int, default=25, help="steps between two checkpoints")
    parser.add_argument("--page", type=Path, help="renew the table of this page, and train nothing")
    args = parser.parse_args(words)
    if args.page:
        from recipes_page import renew

        renew(args.page, rows_of(args.results))
    elif not args.name or not args.root:
        parser.error("pass a NAME and --root FOLDER, or --page FILE alone")
    else:
        trial(args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
