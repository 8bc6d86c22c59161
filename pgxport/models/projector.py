# SPDX-License-Identifier: Apache-2.0
"""The projector: one linear map from the vision encoder's space into the decoder's."""

from pgxport.models.layers import Writer
from pgxport.models.spec import ModelSpec


def projector(g: Writer, spec: ModelSpec) -> None:
    """Writes the projector: image_hidden [B, image tokens, vision width] -> image_features [B, image tokens, H].

    Image features, unlike token embeddings, are not multiplied by √H.
    """
    x = g.input("image_hidden", ["batch", spec.image_tokens, spec.vision.width])
    with g.scope("multi_modal_projector"):
        x = g.linear(x, "linear", bias=True, gain=1 / spec.text.residual_divisor)
    g.output(x, "image_features", ["batch", spec.image_tokens, spec.text.width])
