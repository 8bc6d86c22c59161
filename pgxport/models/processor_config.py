# SPDX-License-Identifier: Apache-2.0
"""The reader of preprocessor_config.json, and of processor_config.json: how a picture becomes the encoder's numbers."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from pgxport.bundle.manifest import Pixels, Resample
from pgxport.errors import CheckpointError
from pgxport.models.checkpoint import Checkpoint
from pgxport.models.config import NOTHING, OTHER
from pgxport.models.schema import FileSchema, Only, Size
from pgxport.models.spec import ModelSpec

RESAMPLE: dict[int, Resample] = {
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
    4: "box",
    5: "hamming",
}  # Pillow's numbers
Level = Annotated[float, Field(ge=-1e6, le=1e6)]
Channels = Level | Annotated[list[Level], Field(min_length=3, max_length=3)]
SIGLIP = "SiglipImageProcessor", "SiglipImageProcessorFast", "SiglipImageProcessorPil"  # three names of one
INPUT = "of the picture as it is given, which pgx finds out"


class PictureSize(FileSchema):
    """The size that pictures are brought to, in pixels."""

    height: Size
    width: Size

    only: ClassVar[Mapping[str, Only]] = dict.fromkeys(
        ("shortest_edge", "longest_edge", "max_height", "max_width", "min_pixels", "max_pixels"),
        ((None,), "which keeps the aspect"),
    )


class PreprocessorConfig(FileSchema):
    """preprocessor_config.json, or `image_processor` of processor_config.json, as transformers 4.57 and 5.x read it."""

    size: dict[str, Any] | None = None
    resample: Annotated[int, Field(ge=0, le=5)] = 3
    do_rescale: bool = True
    rescale_factor: Annotated[float, Field(gt=0, le=1e6)] = 1 / 255
    do_normalize: bool = True
    image_mean: Channels = 0.5
    image_std: Channels = 0.5
    image_seq_length: Annotated[int, Field(ge=1, le=1 << 16)] | None = None

    only: ClassVar[Mapping[str, Only]] = {
        "do_resize": ((True, None), "which leaves pictures as large as they are"),
        "do_convert_rgb": (
            (True, False, None),
            "which is no such switch",
        ),  # pgx always does; of an RGB picture it changes nothing
        "do_center_crop": ((False, None), "which cuts pictures"),
        "do_pad": ((False, None), "which adds borders"),
        "do_pan_and_scan": ((False, None), "which cuts pictures"),
        # transformers chooses the class by its name, and each class has defaults and steps of its own.
        "image_processor_type": ((*SIGLIP, None), "which has other defaults and steps"),
        "feature_extractor_type": ((*SIGLIP, "SiglipFeatureExtractor", None), "which has other defaults and steps"),
    }
    no_effect: ClassVar[Mapping[str, str]] = {
        "processor_class": NOTHING, "_valid_processor_keys": NOTHING,
        "transformers_version": NOTHING, "_processor_class": NOTHING, "use_fast": NOTHING, "backend": NOTHING, "device": NOTHING,
        "image_processor": "of processor_config.json",
        "auto_map": "code of its author, which pgx never runs", "return_tensors": "of how arrays are given", "data_format": "of how arrays are given",
        "input_data_format": INPUT, "disable_grouping": "of speed", "default_to_square": "of a size that is one number, which is refused",
        "crop_size": "of crops, which are refused", "pad_size": "of borders, which are refused",
    }  # fmt: skip

    @model_validator(mode="after")
    def _divides(self) -> "PreprocessorConfig":
        if self.do_normalize and 0 in _three(self.image_std):
            raise ValueError(f"image_std is {self.image_std}, and levels are divided by it")
        return self


class ProcessorConfig(FileSchema):
    """processor_config.json of transformers 5.x."""

    image_processor: dict[str, Any] | None = None

    no_effect: ClassVar[Mapping[str, str]] = {
        "processor_class": NOTHING, "auto_map": "code of its author, which pgx never runs", "chat_template": "of chats", "audio_tokenizer": OTHER,
        "tokenizer": "of the tokenizer, which is read from its own files", "image_seq_length": "of the image processor, whose own it is",
        "transformers_version": NOTHING, "_processor_class": NOTHING,
    }  # fmt: skip


def read_pixels(preprocessor: Mapping[str, Any] | None, processor: Mapping[str, Any] | None, spec: ModelSpec) -> Pixels:
    """How the checkpoint's own processor makes pixel values.

    As in transformers 5.x, `image_processor` of processor_config.json goes before preprocessor_config.json; without
    either it is PaliGemma's way.

    Args:
        preprocessor: preprocessor_config.json; None: there is none.
        processor: processor_config.json; None: there is none.

    Raises:
        CheckpointError: they ask for something that pgx does not compute, or for another size than the model's.
    """
    values, where = preprocessor, "preprocessor_config.json"
    if processor is not None and (nested := ProcessorConfig.read(processor, "processor_config.json").image_processor) is not None:
        values, where = nested, "processor_config.json: image_processor"
    if values is None:
        return Pixels()
    read = PreprocessorConfig.read(values, where)
    side = spec.resolution
    if read.size is not None:
        size = PictureSize.read(read.size, f"{where}: size")
        if (size.height, size.width) != (side, side):
            raise CheckpointError(
                f"{where}: pictures become {size.height} × {size.width}, and the vision encoder of config.json reads {side} × {side}; "
                f"give the two files of one model"
            )
    if read.image_seq_length not in (None, spec.image_tokens):
        raise CheckpointError(
            f"{where}: image_seq_length is {read.image_seq_length}, and an image of config.json has {spec.image_tokens} tokens; "
            f"give the two files of one model"
        )
    return Pixels(
        resample=RESAMPLE[read.resample],
        rescale=read.rescale_factor if read.do_rescale else 1.0,
        mean=_three(read.image_mean) if read.do_normalize else (0.0, 0.0, 0.0),
        std=_three(read.image_std) if read.do_normalize else (1.0, 1.0, 1.0),
    )


def pixels_of(checkpoint: Checkpoint, spec: ModelSpec) -> Pixels:
    """How the processor beside a checkpoint, or beside its adapter, makes pixel values.

    Raises:
        CheckpointError: as `read_pixels`.
    """
    files = "preprocessor_config.json", "processor_config.json"
    return read_pixels(checkpoint.json(*files), checkpoint.json(*reversed(files)), spec)


def _three(value: float | list[float]) -> tuple[float, float, float]:
    first, second, third = value if isinstance(value, list) else [value] * 3
    return first, second, third
