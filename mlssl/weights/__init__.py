"""Open backbones and their weights from checkpoints, exported files and names."""
