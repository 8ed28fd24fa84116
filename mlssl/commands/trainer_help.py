"""Help of fit, validate and test as text: LightningCLI takes seconds, and lists hundreds of arguments."""

from __future__ import annotations

_MORE_OPTIONS = """
  --trainer.devices N      like every other argument of lightning.Trainer
  --config FILE            YAML with any of these, as printed by --print_config
  --model PATH             class to build, such as my_package.MyModule; its
                           arguments are --model.NAME. --data PATH likewise
  --print_config           print the settings and stop
  --help_all               every argument of trainer, model and data"""

_CHECKPOINT_OPTIONS = (
    """
  --ckpt_path FILE         checkpoint of mlssl fit
  --data.dataset NAME      synthetic (default), folder, coco, roboflow, voc,
                           corel5k, manifest, shards
  --data.root FOLDER       folder of the images
  --data.eval_size N       side to which whole images are resized"""
    + _MORE_OPTIONS
)

TRAINER_HELP = {
    "fit": """usage: mlssl fit [OPTIONS]

Pre-train a backbone. Everything is written to a new folder, RUNS/NAME-<time>.

  --data.dataset NAME      synthetic (default), folder, coco, roboflow, voc,
                           corel5k, manifest, shards
  --data.root FOLDER       folder of the images
  --data.annotations FILE  in place of both: COCO, Label Studio, CVAT, CSV;
                           --data.images FOLDER, --data.val_fraction SHARE
  --data.batch_size N      images per step on one device (default: 64)
  --data.size N            side of a view in pixels (default: 224)
  --data.rows N            rows of the grid of blocks (default: 2)
  --data.cols N            columns of the grid (default: 2)
  --data.overlap SHARE     fraction of the image side, 0 to 0.5 (default: 0.2)
  --data.branches NAME     augmentation: paper, soft, gray, overhead, or YAML
  --model.backbone NAME    timm name, or torchvision/NAME (default: resnet50)
  --model.base_lr RATE     learning rate for 256 views per step (default: 0.05)
  --trainer.max_epochs N   passes over the images
  --trainer.logger CLASS   WandbLogger, TensorBoardLogger, ...; metrics.csv is
                           always written
  --recipe NAME            settings of a recipe: mlssl, paper, or a YAML file;
                           --config overrides it, and the other options
                           override both
  --name NAME              name of the run's folder
  --runs FOLDER            folder in which runs are created
  --resume RUN             resume a stopped run in its folder; the classes and
                           functions named in its config.yaml are imported,
                           so resume only runs you trust
  --start_from CHECKPOINT  start a new run from the weights of another one"""
    + _MORE_OPTIONS
    + """

Example: mlssl fit --data.dataset folder --data.root photos/ --recipe paper""",
    "validate": """usage: mlssl validate --ckpt_path FILE [OPTIONS]

Score the online probe of a checkpoint on the val set.
"""
    + _CHECKPOINT_OPTIONS
    + """

Example: mlssl validate --ckpt_path last.ckpt --config run.yaml""",
    "test": """usage: mlssl test --ckpt_path FILE [OPTIONS]

Score the online probe of a checkpoint on the test set.
"""
    + _CHECKPOINT_OPTIONS
    + """

Example: mlssl test --ckpt_path last.ckpt --config run.yaml""",
}
"""Command → its most used arguments."""
