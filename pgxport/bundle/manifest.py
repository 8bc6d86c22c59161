# SPDX-License-Identifier: Apache-2.0
"""The manifest of a bundle: the one contract between the half that exports and the half that runs."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from pgxport.errors import IntegrityError

MANIFEST = "manifest.json"
CARD = "README.md"  # the model card, for people and the hub
MAX_MANIFEST_BYTES = 16 << 20


def _plain(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}", name):
        raise ValueError(f"{name!r} is not a plain file name")
    return name


FileName = Annotated[str, AfterValidator(_plain)]


TokenId = Annotated[int, Field(ge=0)]
Float = Literal["float32", "float16", "bfloat16"]
WeightDtype = Literal["float32", "float16", "bfloat16", "int8", "int4"]
CountedDtype = Literal["float32", "float16", "bfloat16", "int8", "int4", "float8"]
CacheDtype = Literal["float32", "float16", "bfloat16", "int8"]  # in a KV cache
TrtVersion = Literal["10.3", "10.16", "11"]
CacheKind = Literal["shared", "delta", "update"]
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}  # numpy alone does not know bfloat16
Resample = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]  # as Pillow calls them
Level = Annotated[float, Field(allow_inf_nan=False)]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileInfo(_Frozen):
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(ge=0)


class TensorInfo(_Frozen):
    """An input or output of a graph; a string in the shape is an axis of free length."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class GraphInfo(_Frozen):
    file: FileName
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


class TokenTable(_Frozen):
    """The embedding [vocab, width], row by row in a file of its own; a looked-up row is multiplied by `scale`.

    Quantized values have scales, at `scales_offset` of the same file, one for each `group` of a
    row's numbers, and stand at its beginning: with a group bytes around 128 or pairs of 4 bits
    around 8, the lower half first, the last group filled up; without one, int8 and one scale a row.
    """

    file: FileName
    dtype: WeightDtype
    shape: tuple[PositiveInt, PositiveInt]
    scale: float = Field(gt=0, allow_inf_nan=False)
    group: Annotated[int, Field(ge=16, le=65536)] | None = None
    scales_offset: Annotated[int, Field(gt=0)] | None = None
    scales_dtype: Float | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        quantized = self.dtype in ("int8", "int4")
        if quantized != (self.scales_offset is not None) or quantized != (self.scales_dtype is not None):
            raise ValueError(f"a token table of {self.dtype} with scales of {self.scales_dtype} at {self.scales_offset}")
        if (self.group is not None and not quantized) or (self.group is None and self.dtype == "int4"):
            raise ValueError(f"a token table of {self.dtype} in groups of {self.group}")
        if self.group is not None and self.group & (self.group - 1):
            raise ValueError(f"groups of {self.group}, which is no power of two")
        return self

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, without its scales."""
        if self.group is None:
            return self.shape[1] * ITEM_BYTES[self.dtype]
        return self.groups * self.group * (8 if self.dtype == "int8" else 4) // 8

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return 1 if self.group is None else -(-self.shape[1] // self.group)

    @property
    def nbytes(self) -> int:
        """Bytes of the token table's file."""
        if self.scales_offset is None:
            return self.shape[0] * self.row_bytes
        return self.scales_offset + self.shape[0] * self.groups * ITEM_BYTES[self.scales_dtype or "float32"]


class Cache(_Frozen):
    """The KV cache: for each layer a key and a value buffer.

    kind "shared": past and present are one buffer [batch, kv_heads, capacity, head_dim],
    which a node of ONNX Runtime appends to; "update": the same shape, which TensorScatter
    writes into; "delta": [batch, capacity, kv_heads, head_dim], which the graph only reads:
    it gives the new rows [batch, tokens, kv_heads, head_dim], and the runner copies them in.
    """

    kind: CacheKind = "shared"
    layers: int = Field(gt=0, le=1024)
    kv_heads: int = Field(gt=0, le=1024)
    head_dim: int = Field(gt=0, le=1024)
    dtype: CacheDtype


class TokenIds(_Frozen):
    """The ids with a meaning of their own. `newline` ends the prefix; `<loc…>` and `<seg…>` are runs of consecutive ids."""

    bos: TokenId
    eos: TokenId
    pad: TokenId
    newline: TokenId
    image: TokenId
    loc_first: TokenId
    loc_count: int = Field(ge=0)
    seg_first: TokenId
    seg_count: int = Field(ge=0)
    special: tuple[TokenId, ...] = ()  # the fine-tune's own special tokens, which a prompt may use if its author asks for it


class Pixels(_Frozen):
    """How a picture becomes pixel values: resized, its levels × `rescale`, less `mean`, over `std`. The defaults are PaliGemma's."""

    resample: Resample = "bicubic"
    rescale: float = Field(default=1 / 255, gt=0, allow_inf_nan=False)
    mean: tuple[Level, Level, Level] = (0.5, 0.5, 0.5)
    std: tuple[Level, Level, Level] = (0.5, 0.5, 0.5)

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if 0 in self.std:
            raise ValueError(f"a standard deviation of {self.std}")
        return self


class Generation(_Frozen):
    """What the checkpoint says of its answers, beside the token ids."""

    stop: tuple[TokenId, ...] = Field(default=(), max_length=1024)  # an answer ends before any of these; none: before eos
    max_new_tokens: int | None = Field(default=None, gt=0, le=1 << 20)  # None: pgx's own limit
    kept: dict[str, Any] = {}  # settings of sampling and the like, which greedy answers do not heed


class Ranges(_Frozen):
    """The largest |x| of each kind of number, and where it was, in float32 on calibration scenes."""

    largest: dict[str, float]
    where: dict[str, str]
    scenes: int


class Parity(_Frozen):
    """What quantization cost against the checkpoint, teacher-forced, at every token of the answers."""

    scenes: int
    image_tokens: int | None = None  # of each scene, an even subset where it is less than the model's; None: all
    positions: int
    kl: float  # mean Kullback-Leibler divergence from the checkpoint's next-token distribution, in nats
    kl_worst: float
    agreement: float  # share of positions where both find the same token likeliest
    sqnr: dict[str, float | None]  # of each rounded matrix, in dB, worst first; None: rounding changed nothing

    @property
    def losses(self) -> list[tuple[str, float]]:
        """The matrices that rounding changed and their SQNR in dB, worst first."""
        return sorted(((path, db) for path, db in self.sqnr.items() if db is not None), key=lambda item: item[1])


class MeasuredAnswers(_Frozen):
    """What a report measured of the bundle's own answers to samples, on one device; `pgx card --report` writes it."""

    data: str  # what the samples are from, for people
    samples: int
    reference: str  # the bundle or checkpoint that its answers were compared with
    agreement: float | None  # share of next tokens along the reference's answers that both find likeliest; None: not compared
    kl: float | None  # mean over the same positions, in nats
    empty: int
    malformed: int  # answers of which a part could not be read, or that locate nothing where they should


class Provenance(_Frozen):
    """The origin of a bundle: its checkpoint, calibration and versions."""

    checkpoint: str  # a name for people, never a path
    revision: str | None  # the hub's commit, where it comes from the hub
    repository: str | None = None  # and its name there
    license: Literal["apache-2.0", "gemma"] | None = None  # of the checkpoint, as the hub calls it; None: not known to pgx
    adapters: tuple[str, ...] = ()  # names for people of those that were merged, in their order
    skipped: dict[str, str] = {}  # tensors of the checkpoint that no answer depends on, and why
    remarks: tuple[str, ...] = ()  # what someone should know about how the checkpoint was read
    tokenizer: str | None = None  # how it differs from the checkpoint's, where it is an adapter's own
    checkpoint_sha256: str
    calibration: str | None = None  # where statistics come from if not from a file, as in "embedded scenes (2)"
    calibration_sha256: str | None = None
    versions: dict[str, str]


class Manifest(_Frozen):
    format_version: Literal[1] = 1
    name: str
    family: str
    # The limits are far beyond any PaliGemma: what a stranger's
    # manifest can make a runner allocate ends there.
    resolution: int = Field(gt=0, le=4096)
    image_tokens: int = Field(gt=0, le=1 << 16)
    context_length: int = Field(gt=0, le=1 << 20)  # the longest prefix and answer together
    max_new_tokens: int = Field(gt=0, le=1 << 20)  # unless the caller says otherwise
    local_window: PositiveInt | None  # tokens that a generated token sees in local layers; None where no layer needs telling
    residual_divisor: float = Field(ge=1)  # what the residual stream is divided by, to stay inside float16
    ranges: Ranges | None  # what that was chosen by; None where activations are not float16
    parity: Parity | None  # None where nothing is quantized, or the comparison was not asked for
    measured: tuple[MeasuredAnswers, ...] = ()  # no part of the digest: it may be written again, as the card
    recipe: str  # its rules are in recipe.toml
    target: str
    tensorrt: TrtVersion | None = None  # the version that the graphs were written for; of target tensorrt alone
    parameters: int
    stored: dict[str, dict[CountedDtype, PositiveInt]]  # how many weights of each dtype, by graph, and for the token table
    spec: dict[str, Any]  # the ModelSpec, for people and reports
    pixels: Pixels = Pixels()
    generation: Generation = Generation()
    token_ids: TokenIds
    token_table: TokenTable
    cache: Cache
    graphs: dict[str, GraphInfo]
    files: dict[FileName, FileInfo]
    provenance: Provenance

    @model_validator(mode="after")
    def _of_one_target(self) -> Self:
        kind = "shared" if self.tensorrt is None else "update" if self.tensorrt == "11" else "delta"
        if (self.target == "tensorrt") != (self.tensorrt is not None) or self.cache.kind != kind:
            raise ValueError(f"target {self.target} for TensorRT {self.tensorrt} with a cache of kind {self.cache.kind}")
        return self

    @property
    def stop(self) -> frozenset[int]:
        """The ids before which an answer ends."""
        return frozenset(self.generation.stop or (self.token_ids.eos,))

    def signatures(self) -> dict[str, tuple[set[str], set[str]]]:
        """Returns the inputs that runners feed to each graph, and the outputs they take, by graph."""
        cache = [f"{i}.{part}" for i in range(self.cache.layers) for part in ("key", "value")]
        feeds, takes = {"inputs_embeds"}, {"logits"}
        if self.cache.kind == "shared":
            feeds |= {"seqlens_k", "total_sequence_length"} | ({"local_bias"} if self.local_window is not None else set())
        else:
            feeds |= {"positions", "visible"} | ({"local_visible"} if self.local_window is not None else set())
            feeds |= {"write_indices"} if self.cache.kind == "update" else set()
            takes |= {"next_token", "logits_square"}
        feeds |= {f"past_key_values.{c}" for c in cache}
        known = {
            "vision_encoder": ({"pixel_values"}, {"image_hidden"}),
            "projector": ({"image_hidden"}, {"image_features"}),
            "decoder_step": (feeds, takes | {f"present.{c}" for c in cache}),
        }
        return known | ({"mask_decoder": ({"codes"}, {"mask"})} if "mask_decoder" in self.graphs else {})


def parse_manifest(text: bytes, name: str) -> Manifest:
    """Parses a manifest; messages call it `name`.

    Raises:
        IntegrityError: it is none of this format.
    """
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise IntegrityError(
            f"{name}: {where}: {first['msg']}. This pgx reads bundles of format 1; export again or update pgx"
        ) from None
