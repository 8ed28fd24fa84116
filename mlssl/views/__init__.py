"""Block-wise augmented views of an image: where they lie (`grid`), how they look (`photometric`), both (`blocks`)."""
