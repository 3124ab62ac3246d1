"""MobileSAM (Zhang et al., 2023): a TinyViT encoder in front of segment_anything's prompt encoder and mask decoder."""

from __future__ import annotations

from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

IMG_SIZE = 1024
STRIDE = 16
WIDTH = 256


def build_mobile_sam() -> Sam:
    """An untrained MobileSAM whose state dict has the keys and shapes of the official `mobile_sam.pt`.

    1024 x 1024 input, embedding 256 x 64 x 64. The encoder is kornia's (Apache-2.0). Call `.eval()` again after loading
    weights or moving it: kornia 0.8 caches the attention biases when a TinyViT is put in evaluation mode.
    """
    # Here, as kornia takes a second to import and no other model needs it.
    try:
        from kornia.models.tiny_vit import TinyViT
    except ModuleNotFoundError:  # kornia 0.8, the last for Python 3.10
        from kornia.contrib.models.tiny_vit import TinyViT

    side = IMG_SIZE // STRIDE
    return Sam(
        image_encoder=TinyViT.from_config("5m", img_size=IMG_SIZE, mobile_sam=True),
        prompt_encoder=PromptEncoder(
            embed_dim=WIDTH, image_embedding_size=(side, side), input_image_size=(IMG_SIZE, IMG_SIZE), mask_in_chans=16
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=2, embedding_dim=WIDTH, mlp_dim=2048, num_heads=8),
            transformer_dim=WIDTH,
            iou_head_depth=3,
            iou_head_hidden_dim=256,
        ),
    )
