"""Backbones and their weights: opened from checkpoints, exported files and names."""
