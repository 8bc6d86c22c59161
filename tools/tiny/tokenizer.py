# SPDX-License-Identifier: Apache-2.0
"""Train the tiny tokenizer: Gemma's layout (BPE over `▁`, byte fallback, a newline of its own) with a small vocabulary.

Ids follow PaliGemma's plan in small: 512 text tokens, 1024 `<loc>`, 128 `<seg>`, `<image>`, and an embedding padded by 64 rows.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from pgxport.models.tiny.scenes import ask, draw

TEXT_TOKENS, LOCATIONS, SEGMENTS = 512, 1024, 128
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
IMAGE_ID = TEXT_TOKENS + LOCATIONS + SEGMENTS
ROWS = IMAGE_ID + 64


def train() -> Tokenizer:
    """Learn merges from prompts and answers in words; printed signs stay one token a character."""
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    printable = ["\n", "▁", *(chr(c) for c in range(33, 127))]
    corpus = []
    for index in range(3000):
        for q in ask(draw("train", index), index):
            corpus += [
                q.prompt,
                *([] if q.task == "ocr" or not q.answer else [q.answer]),
                *(f" {label}" for label, _ in q.things),
            ]
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    size = TEXT_TOKENS - len(SPECIAL) - len(bytes_)
    learner.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=size, initial_alphabet=printable, show_progress=False, min_frequency=20)
    )
    learned = json.loads(learner.to_str())["model"]

    words = [w for w, _ in sorted(learned["vocab"].items(), key=lambda item: item[1])]
    vocabulary = [*SPECIAL, *bytes_, *words]
    vocabulary += [f"<unused{i}>" for i in range(TEXT_TOKENS - len(vocabulary))]
    ids = {token: i for i, token in enumerate(vocabulary)}
    merges = [tuple(m) for m in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(f"<loc{i:04d}>", normalized=False) for i in range(LOCATIONS)])
    tokenizer.add_tokens([AddedToken(f"<seg{i:03d}>", normalized=False) for i in range(SEGMENTS)])
    tokenizer.add_special_tokens([AddedToken("<image>", special=True, normalized=False)])
    assert tokenizer.token_to_id("<image>") == IMAGE_ID
    return tokenizer


def write(folder: Path, image_tokens: int, resolution: int) -> None:
    """Write tokenizer and processor files in hub layout."""
    train().save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "GemmaTokenizerFast", "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False,
        "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>",
        "extra_special_tokens": {"image_token": "<image>"}, "image_token": "<image>", "model_max_length": 1024, "processor_class": "PaliGemmaProcessor",
    }  # fmt: skip
    preprocessor = {
        "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "image_processor_type": "SiglipImageProcessor", "image_seq_length": image_tokens, "processor_class": "PaliGemmaProcessor", "resample": 3,
        "rescale_factor": 1 / 255, "size": {"height": resolution, "width": resolution},
    }  # fmt: skip
    for name, content in (("tokenizer_config.json", tokenizer_config), ("preprocessor_config.json", preprocessor)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
