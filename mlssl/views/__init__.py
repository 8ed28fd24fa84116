"""Block-wise augmented views of an image.

`blocks` puts them together: where they lie (`grid`, `regions`), how they look (`branches`: a `recipe`, an
albumentations pipeline or a function), which random numbers they get (`streams`, `draws`) and their pixels (`pixels`).
Importing and rendering need no torch.
"""
