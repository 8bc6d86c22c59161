# SPDX-License-Identifier: Apache-2.0
"""The sizes and constants of a PaliGemma as frozen dataclasses, and the table of the published models.

>>> published("paligemma2", "3b", 448).image_tokens
1024
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from pgxport.errors import UsageError


@dataclass(frozen=True)
class VisionSpec:
    """Sizes of the SigLIP encoder. The defaults are So400m/14's, which every published PaliGemma has."""

    resolution: int  # of the square image, in pixels
    width: int = 1152
    depth: int = 27
    heads: int = 16
    mlp: int = 4304
    patch: int = 14  # the side of a square patch, in pixels
    eps: float = 1e-6

    @property
    def image_tokens(self) -> int:
        """Number of patches of an image, each of which becomes one token."""
        return (self.resolution // self.patch) ** 2


@dataclass(frozen=True)
class TextSpec:
    """Sizes and constants of the Gemma decoder. Gemma 2 differs in `post_norms`, the soft caps and the local layers."""

    width: int
    depth: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int = 256
    vocab: int = 257216
    eps: float = 1e-6
    rope_theta: float = 10000.0
    query_scale: float = 256**-0.5
    post_norms: bool = False
    attn_softcap: float | None = None
    logit_softcap: float | None = None
    window: int | None = None  # how many tokens a generated token sees in the local layers; None: all
    local_layers: tuple[int, ...] = ()
    tied: bool = True  # the output matrix is the embedding
    residual_divisor: float = 1.0  # a power of two that keeps the residual stream inside float16's range; see `shrunk`

    @property
    def embed_scale(self) -> float:
        """Factor of the token embeddings, but not of image features: √width, over the residual divisor."""
        return self.width**0.5 / self.residual_divisor


@dataclass(frozen=True)
class ModelSpec:
    """One PaliGemma: its family ("paligemma" or "paligemma2"), its vision encoder and its decoder."""

    family: str
    vision: VisionSpec
    text: TextSpec

    @property
    def image_tokens(self) -> int:
        return self.vision.image_tokens

    @property
    def resolution(self) -> int:
        return self.vision.resolution

    def described(self) -> dict[str, Any]:
        """Returns the spec as a manifest has it: without `tied` where that is true, as in bundles from before there was the field."""
        plain = asdict(self)
        if plain["text"]["tied"]:
            del plain["text"]["tied"]
        return plain


def _gemma2(width: int, depth: int, mlp: int, heads: int, kv_heads: int, head_dim: int = 256, scalar: int = 256) -> TextSpec:
    return TextSpec(
        width,
        depth,
        mlp,
        heads,
        kv_heads,
        head_dim,
        query_scale=scalar**-0.5,
        post_norms=True,
        attn_softcap=50.0,
        logit_softcap=30.0,
        window=4096,
        local_layers=tuple(range(0, depth, 2)),
    )


TEXT = {
    ("paligemma", "3b"): TextSpec(2048, 18, 16384, 8, 1),
    ("paligemma2", "3b"): _gemma2(2304, 26, 9216, 8, 4),
    ("paligemma2", "10b"): _gemma2(3584, 42, 14336, 16, 8),
    ("paligemma2", "28b"): _gemma2(4608, 46, 36864, 32, 16, head_dim=128, scalar=144),
}
RESOLUTIONS = (224, 448, 896)
TINY_RESOLUTIONS = (112, 224)
SIZES = ("tiny", "3b", "10b", "28b")


def published(family: str, size: str, resolution: int) -> ModelSpec:
    """Returns the spec of a published checkpoint.

    Raises:
        UsageError: no checkpoint of that family, size and resolution was published.
    """
    if (family, size) not in TEXT:
        sizes = ", ".join(f"{f} {s}" for f, s in TEXT)
        raise UsageError(f"no {family} of size {size!r} was published; the published ones are: {sizes}")
    if resolution not in RESOLUTIONS:
        raise UsageError(f"no {family} {size} at {resolution} px was published; choose --res {', '.join(map(str, RESOLUTIONS))}")
    return ModelSpec(family, VisionSpec(resolution), TEXT[family, size])


def without_window(spec: ModelSpec) -> ModelSpec:
    """Returns the model as the training code computes it: generated tokens see the whole prefix in every layer."""
    return replace(spec, text=replace(spec.text, window=None, local_layers=()))


def shrunk(spec: ModelSpec, divisor: float) -> ModelSpec:
    """Returns the model with its residual stream divided by a power of two, so that float16 does not overflow.

    Embeddings, image features and each layer's two contributions are divided as they enter the
    stream. RMSNorm undoes the division where it reads the stream: rms(x / s) = rms(x) / s once
    eps is divided by s². Dividing by a power of two changes only exponents, so nothing is lost.

    Raises:
        UsageError: `divisor` is not a power of two.
    """
    if divisor < 1 or divisor != 2 ** (int(divisor).bit_length() - 1):
        raise UsageError(f"the residual stream can be divided by a power of two, not by {divisor}")
    return replace(spec, text=replace(spec.text, residual_divisor=float(divisor)))
