"""Images in, `Segmentation` out."""
