# SPDX-License-Identifier: Apache-2.0
"""The model card of a bundle, README.md: what the hub reads of it, and what people do. A pure function of the manifest.

Names and numbers may be a stranger's: all of them pass `markdown` or `yaml`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pgxport.bundle.manifest import CARD, Manifest, Parity
from pgxport.text import Plain, markdown, yaml

WORST = 5  # matrices that rounding hurt most
INSTALLED = {"cpu": "cpu", "cuda": "gpu", "tensorrt": "tensorrt"}  # target -> extra
LIBRARY = {"cpu": "onnxruntime", "cuda": "onnxruntime", "tensorrt": "tensorrt"}


@dataclass(frozen=True)
class CardResults:
    """The results that a report has of this bundle."""

    results: Sequence[Mapping[str, Plain]]  # as the hub's model-index has them
    text: str  # Markdown, escaped


def card(m: Manifest, measured: CardResults | None = None) -> str:
    """The whole of README.md."""
    about = [
        ("model", f"{m.family} at {m.resolution} px, {m.parameters / 1e6:,.1f} million parameters"),
        ("checkpoint", _checkpoint(m)),
        ("recipe", f"{m.recipe}: {_stored(m)}; the rules are in recipe.toml"),
        ("KV cache", m.cache.dtype),
        ("runs on", m.target),
        ("tokens", f"up to {m.context_length} of prefix and answer, {m.image_tokens} of them an image"),
        ("masks", "with the mask decoder" if "mask_decoder" in m.graphs else "boxes and codes only, without the mask decoder"),
        ("written by", ", ".join(f"{package} {version}" for package, version in m.provenance.versions.items())),
    ]
    if m.provenance.adapters:
        about.insert(2, ("adapters", ", ".join(m.provenance.adapters)))
    if m.provenance.calibration_sha256 or m.provenance.calibration:
        about.insert(3, ("calibration", m.provenance.calibration or f"sha256 {m.provenance.calibration_sha256}"))
    files = [(name, _bytes(info.size), info.sha256) for name, info in sorted(m.files.items()) if name != CARD]
    sections = [
        f"---\n{yaml(_metadata(m, measured))}---\n# {markdown(f'{m.name}, {m.recipe}, for {m.target}')}\n",
        f'    pip install "pgxport[{INSTALLED.get(m.target, "cpu")}]"\n'
        f'    pgx run . --image cat.jpg --prompt "detect cat" --save out.png\n',
        table(("", ""), about),
        measured.text if measured else "",
        _parity(m.parity, m.image_tokens) if m.parity else "",
        "## Licence\n\n" + _licence(m),
        "## Files\n\n" + table(("file", "size", "sha256"), files),
    ]
    return "\n".join(section for section in sections if section)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of texts of any origin."""
    lines = [head, *rows]
    cells = [f"| {' | '.join(markdown(cell) for cell in line)} |" for line in lines]
    return "\n".join([cells[0], "|" + "---|" * len(head), *cells[1:]]) + "\n"


def _metadata(m: Manifest, measured: CardResults | None) -> dict[str, Plain]:
    metadata: dict[str, Plain] = {"library_name": "pgxport", "pipeline_tag": "image-text-to-text"}
    if m.provenance.license:
        metadata["license"] = m.provenance.license
    if m.provenance.repository:
        metadata["base_model"] = m.provenance.repository
        if m.parity or {"int4", "int8"} & {dtype for stored in m.stored.values() for dtype in stored}:
            metadata["base_model_relation"] = "quantized"
    metadata["tags"] = list(dict.fromkeys([m.family, "onnx", LIBRARY.get(m.target, m.target), m.recipe]))
    if measured and measured.results:
        metadata["model-index"] = [{"name": f"{m.name}, {m.recipe}, for {m.target}", "results": list(measured.results)}]
    return metadata


def _checkpoint(m: Manifest) -> str:
    p = m.provenance
    revision = f" at {p.revision}" if p.revision else ""
    return f"{p.repository or p.checkpoint}{revision}, sha256 {p.checkpoint_sha256}"


def _stored(m: Manifest) -> str:
    counts: Counter[str] = Counter()
    for stored in m.stored.values():
        counts.update(stored)
    total = sum(counts.values())
    return ", ".join(f"{count / total:.1%} of the weights in {dtype}" for dtype, count in counts.most_common())


def _parity(p: Parity, image_tokens: int) -> str:
    part = p.image_tokens is not None and p.image_tokens < image_tokens
    subset = f" with {p.image_tokens} of their {image_tokens} image tokens" if part else ""
    lost = [(path, f"{decibels:.1f}") for path, decibels in p.losses[:WORST]]
    worst = "\n" + table(("weight that rounding hurt most", "SQNR, dB"), lost) if lost else ""
    return (
        f"## Against the checkpoint\n\nOn {p.positions} tokens of {p.scenes} drawn scene{'s' * (p.scenes > 1)}{subset}, measured by the "
        f"export in float32 arithmetic: both find the same next token likeliest on {p.agreement:.2%}; KL {p.kl:.2g} nats on average, "
        f"{p.kl_worst:.2g} at worst.\n{worst}"
    )


def _licence(m: Manifest) -> str:
    if m.provenance.license == "gemma":
        return "The weights are Google's, changed in form: the [Gemma terms](https://ai.google.dev/gemma/terms) hold for them.\n"
    if m.provenance.license:
        return "Apache License 2.0, the checkpoint as well as pgx.\n"
    return "That of the checkpoint, which pgx does not know.\n"


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count} B"
