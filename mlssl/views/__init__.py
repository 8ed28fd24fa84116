"""Block-wise augmented views of an image.

`blocks` combines positions (`grid`, `regions`), augmentations (`branches`: a `recipe`, an albumentations pipeline or a
function), random numbers (`streams`, `draws`) and pixels (`pixels`). Importing and rendering do not need torch.
"""
