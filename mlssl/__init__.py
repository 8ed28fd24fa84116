"""Self-supervised contrastive pre-training on multi-label images."""
