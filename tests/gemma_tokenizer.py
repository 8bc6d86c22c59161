# SPDX-License-Identifier: Apache-2.0
"""Write a very small tokenizer with the real one's layout, whose ids are all different from the real one's."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

CONTROL = ("<pad>", "<eos>", "<bos>", "<unk>")
# SentencePiece's user-defined symbols: added tokens too, but ordinary text.
SYMBOLS = ("<mask>", *(f"<unused{i}>" for i in range(4)), "\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁", "<table>", "</table>")
LOC = tuple(f"<loc{i:04}>" for i in range(1024))
SEG = tuple(f"<seg{i:03}>" for i in range(128))
CORPUS = (
    "answer en what is in the image? caption en a cat sitting on the mat ; two dogs, and 3 birds in the water.",
    "detect person ; car ; traffic light. segment the cat on the left. describe this image in detail, please!",
    "Straße café niño 猫 犬 — “quoted” (text) <b>bold</b> x < y > z unk> bos> eos> pad> image> bos> image> unk> eos>",
    *("bos>", "eos>", "pad>", "unk>", "image>") * 20,
)


def build_tokenizer(path: Path, *, image_special: bool = True, located_special: bool = False) -> None:
    """Write tokenizer.json and tokenizer_config.json into the folder `path`, as on the hub.

    Args:
        path: The folder.
        image_special: Flag `<image>` as special, as published checkpoints do and some fine-tuned ones do not.
        located_special: Flag `<loc…>` and `<seg…>` as special, as some fine-tuned checkpoints do.
    """
    # SentencePiece learns inside words, then sees the sentence whole; only the training needs the split.
    trained = Tokenizer(BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    trained.train_from_iterator(
        CORPUS * 2,
        BpeTrainer(vocab_size=700, special_tokens=[*CONTROL, *(f"<0x{b:02X}>" for b in range(256))], show_progress=False),
    )
    model = json.loads(trained.to_str())["model"]
    learned = [piece for piece in model["vocab"] if piece not in CONTROL and piece not in SYMBOLS]
    vocab = {piece: i for i, piece in enumerate((*CONTROL, *SYMBOLS, *learned, *LOC, *SEG, "<image>"))}
    merges = [tuple(merge) for merge in model["merges"] if "".join(merge) in vocab]
    # Converters derive merges from the vocabulary, so ordinary text can spell a control token without any added token.
    merges += [("<", token[1:]) for token in (*CONTROL, "<image>")]

    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", vocab["<bos>"])]
    )
    special = {**dict.fromkeys(CONTROL, True), "<image>": image_special, **dict.fromkeys((*LOC, *SEG), located_special)}
    # In the order of their ids: tokenizers reassigns none that the vocabulary already has.
    added = [AddedToken(t, normalized=False, special=special.get(t, False)) for t in (*CONTROL, *SYMBOLS, *LOC, *SEG, "<image>")]
    for token in added:
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])

    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "GemmaTokenizer",
        "processor_class": "PaliGemmaProcessor",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "extra_special_tokens": {"image_token": "<image>"},
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
