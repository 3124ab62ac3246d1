"""MobileSAM (Zhang et al., 2023): a TinyViT encoder before segment_anything's other parts."""

from __future__ import annotations

import warnings

from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn

IMG_SIZE, STRIDE, WIDTH = 1024, 16, 256


def build_mobile_sam() -> Sam:
    """An untrained MobileSAM with the keys and shapes of the official `mobile_sam.pt`.

    Returns:
        The model: 1024 x 1024 pixels in, an embedding of 256 x 64 x 64 out. Call `.eval()` again
        after loading weights: TinyViT stores its attention biases in evaluation mode.
    """
    side = IMG_SIZE // STRIDE
    return Sam(
        image_encoder=_tiny_vit(),
        prompt_encoder=PromptEncoder(
            embed_dim=WIDTH,
            image_embedding_size=(side, side),
            input_image_size=(IMG_SIZE, IMG_SIZE),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            transformer=TwoWayTransformer(depth=2, embedding_dim=WIDTH, mlp_dim=2048, num_heads=8),
            transformer_dim=WIDTH,
        ),
    )


def _tiny_vit() -> nn.Module:
    """The image encoder, with the sizes that `build_sam_vit_t` of `mobile_sam` gives it."""
    with warnings.catch_warnings():
        # mobile_sam uses old names of timm's modules and registers models that timm has as well
        warnings.simplefilter("ignore")
        from mobile_sam.modeling import TinyViT  # here: it imports timm, which no other model needs
    return TinyViT(
        img_size=IMG_SIZE,
        in_chans=3,
        num_classes=1000,
        embed_dims=[64, 128, 160, 320],
        depths=[2, 2, 6, 2],
        num_heads=[2, 4, 5, 10],
        window_sizes=[7, 7, 14, 7],
        mlp_ratio=4.0,
        drop_rate=0.0,
        drop_path_rate=0.0,
        use_checkpoint=False,
        mbconv_expand_ratio=4.0,
        local_conv_size=3,
        layer_lr_decay=0.8,
    )
