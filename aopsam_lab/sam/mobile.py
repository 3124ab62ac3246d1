"""MobileSAM (Zhang et al., 2023): a TinyViT encoder before segment_anything's other parts."""

import warnings

from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

WIDTH, STRIDE = 256, 16


def build_mobile_sam() -> Sam:
    """An untrained MobileSAM with the keys and shapes of the official `mobile_sam.pt`.

    Call `.eval()` again after loading weights: TinyViT stores its attention biases then.
    """
    with warnings.catch_warnings():
        # mobile_sam uses old names of timm's modules and registers models that timm has as well
        warnings.simplefilter("ignore")
        from mobile_sam import sam_model_registry  # here: it imports timm, which no other needs
    encoder = sam_model_registry["vit_t"]().image_encoder
    side = encoder.img_size // STRIDE
    transformer = TwoWayTransformer(depth=2, embedding_dim=WIDTH, mlp_dim=2048, num_heads=8)
    return Sam(
        image_encoder=encoder,
        prompt_encoder=PromptEncoder(
            embed_dim=WIDTH,
            image_embedding_size=(side, side),
            input_image_size=(encoder.img_size, encoder.img_size),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(transformer=transformer, transformer_dim=WIDTH),
    )
