"""The small commands of `mlssl`, a typed function each, and LightningCLI for those of the Trainer."""
