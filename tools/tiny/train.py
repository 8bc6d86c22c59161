# SPDX-License-Identifier: Apache-2.0
"""Train the tiny checkpoint: the vision tower on dense labels, then the whole on questions, then again at twice the resolution.

python tools/tiny/data.py SCRATCH && python tools/tiny/vqvae.py SCRATCH && python tools/tiny/train.py SCRATCH

Resumable: state is saved every two minutes. Writes SCRATCH/tiny-112 and SCRATCH/tiny-224 in hub layout.
Sources: Muon (Jordan et al., 2024, the reference implementation's Newton-Schulz coefficients) for matrices, AdamW for the
rest; a constant rate with a linear decay at the end (Hägele et al., 2024).
"""

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from batches import Batch, batches
from export import write_checkpoint
from model import Size, Weights, decode_exact, decode_shared, initial_weights, logits, project, vision
from tokenizer import LOCATIONS, SEGMENTS, TEXT_TOKENS
from tokenizer import train as train_tokenizer
from torch import Tensor
from torch.nn import functional as F
from vqvae import MaskAutoencoder

LOC = slice(TEXT_TOKENS, TEXT_TOKENS + LOCATIONS)
SEG = slice(LOC.stop, LOC.stop + SEGMENTS)


@dataclass(frozen=True)
class Phase:
    """Minutes of training in one mode: dense (vision alone), shared (picture blind to the question) or exact."""

    name: str
    resolution: int
    mode: str
    minutes: float
    images: int
    questions: int
    rate: tuple[float, float]  # at the start and at the end, relative to the base rates
    blur: tuple[float, float] = (0.0, 0.0)  # standard deviation of the location targets, in bins
    vision_rate: float = 1.0


PHASES = (
    Phase("dense-112", 112, "dense", 7, 48, 0, (1.0, 1.0)),
    Phase("shared-112", 112, "shared", 30, 32, 8, (1.0, 0.7), (16.0, 3.0), 0.5),
    Phase("exact-112", 112, "exact", 16, 20, 6, (0.7, 0.0), (3.0, 1.5), 0.5),
    Phase("dense-224", 224, "dense", 4, 16, 0, (0.5, 0.5)),
    Phase("shared-224", 224, "shared", 20, 14, 8, (0.5, 0.4), (3.0, 2.0), 0.7),
    Phase("exact-224", 224, "exact", 18, 8, 6, (0.4, 0.0), (2.0, 1.5), 0.5),
)
WORKERS = 2  # one thread each: small operators gain little from a second thread, and a busy machine stalls less
MUON_RATE, ADAM_RATE, DENSE_WEIGHT = 0.02, 3e-3, 0.3

# name, outputs, column of the table it must tell
THING_HEADS = (("shape", 6, 0), ("colour", 8, 1), ("size", 2, 2))


def initial_heads(width: int) -> Weights:
    sizes = {
        "kind": 3,
        "shape": 6,
        "colour": 8,
        "size": 2,
        "box": 4,
        "letter": 31,
        "order": 4,
        "letter_box": 4,
        "codes": 16 * SEGMENTS,
    }
    heads = {}
    for name, n in sizes.items():
        heads[f"head.{name}.weight"], heads[f"head.{name}.bias"] = torch.randn(n, width) * 0.02, torch.zeros(n)
    return heads


def dense_loss(w: Weights, s: Size, features: Tensor, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """What every patch shows, read off its feature by linear heads: class, colour, box, letter, mask codes."""

    def head(name: str, x: Tensor) -> Tensor:
        return F.linear(x, w[f"head.{name}.weight"], w[f"head.{name}.bias"]).float()

    index = batch.index
    kind = (index > 0).long() + (index > 10).long()
    centre = (torch.arange(s.grid) + 0.5) / s.grid
    at = torch.stack(torch.meshgrid(centre, centre, indexing="ij"), -1).reshape(1, -1, 2).expand(len(index), -1, 2)  # y, x
    loss = F.cross_entropy(head("kind", features).flatten(0, 1), kind.flatten())
    seen = {}
    on = kind == 1
    rows = torch.arange(len(index))[:, None].expand_as(index)
    if on.any():
        x, truth, here = features[on], batch.things[rows[on], index[on] - 1], at[on].repeat(1, 2)
        for name, _, column in THING_HEADS:
            guess, right = head(name, x), truth[:, column].long()
            loss = loss + F.cross_entropy(guess, right)
            seen[name] = (guess.argmax(1) == right).float().mean().item()
        error = (head("box", x) + here - truth[:, 3:]).abs()
        loss = loss + 8 * error.mean()
        seen["box px"] = error.mean().item() * 224
    on = kind == 2
    if on.any():
        x, n = features[on], index[on] - 11
        truth, here = batch.characters[rows[on], n], at[on].repeat(1, 2)
        guess, right = head("letter", x), truth[:, 0].long()
        loss = loss + F.cross_entropy(guess, right) + 0.5 * F.cross_entropy(head("order", x), n)
        loss = loss + 4 * (head("letter_box", x) + here - truth[:, 1:]).abs().mean()
        seen["letter"] = (guess.argmax(1) == right).float().mean().item()
    # The masks' codes, told by the patch nearest to the middle of the thing.
    image, thing = (batch.codes[:, :, 0] >= 0).nonzero(as_tuple=True)
    if len(image):
        box = batch.things[image, thing, 3:]
        y, x = (((box[:, k] + box[:, k + 2]) / 2 * s.grid).long().clamp(0, s.grid - 1) for k in (0, 1))
        guess = head("codes", features[image, y * s.grid + x]).unflatten(1, (16, SEGMENTS))
        right = batch.codes[image, thing]
        loss = loss + F.cross_entropy(guess.flatten(0, 1), right.flatten())
        seen["codes"] = (guess.argmax(-1) == right).float().mean().item()
    return loss, seen


def answer_loss(w: Weights, s: Size, hidden: list[Tensor], batch: Batch, blur: float) -> tuple[Tensor, dict[str, float]]:
    """Cross entropy of the answers' tokens; a location may miss by about `blur` bins."""
    states, targets = [], []
    for h, q in zip(hidden, batch.questions, strict=True):
        at = torch.arange(q.ids.shape[1] - 1)
        # pad is 0 and never part of an answer
        asked = (at + 1 >= q.prefix[:, None]) & (q.ids[:, 1:] != 0)
        states.append(h[:, :-1][asked])
        targets.append(q.ids[:, 1:][asked])
    target = torch.cat(targets)
    log_p = logits(w, s, torch.cat(states)).log_softmax(-1)
    is_loc, is_seg = (target >= LOC.start) & (target < LOC.stop), (target >= SEG.start) & (target < SEG.stop)
    loss = -log_p.gather(1, target[:, None])[:, 0]
    if blur and is_loc.any():
        bins = torch.arange(LOCATIONS)
        near = torch.softmax(-((bins[None] - (target[is_loc] - LOC.start)[:, None]) ** 2) / (2 * blur**2), 1)
        loss = loss.masked_scatter(is_loc, -(log_p[is_loc][:, LOC] * near).sum(1))
    weight = torch.where(is_seg, 0.5, 1.0)
    guess, word = log_p.argmax(1), ~is_loc & ~is_seg
    off = (guess[is_loc] - target[is_loc]).abs().clamp(max=200).float() * 224 / LOCATIONS
    seen = {
        "words": (guess == target)[word].float().mean().item(),
        "loc px": off.mean().item(),
        "seg": (guess == target)[is_seg].float().mean().item(),
    }
    return (loss * weight).sum() / weight.sum(), seen


class Optimizer:
    """Muon for the towers' matrices, AdamW for everything else."""

    def __init__(self, weights: Weights):
        self.weights = weights
        self.matrices: dict[torch.Size, list[str]] = {}
        others = []
        for name, p in weights.items():
            if (p.ndim == 2 and "_proj" in name) or (".mlp." in name and p.ndim == 2):
                self.matrices.setdefault(p.shape, []).append(name)
            else:
                others.append(name)
        self.momentum = {n: torch.zeros_like(weights[n]) for names in self.matrices.values() for n in names}
        self.adam = torch.optim.AdamW(
            [{"params": [weights[n]], "name": n} for n in others], lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0
        )  # fmt: skip

    @torch.no_grad()
    def step(self, rate: float, vision_rate: float) -> None:
        for shape, names in self.matrices.items():
            grads = []
            for n in names:
                g = self.weights[n].grad
                g = torch.zeros_like(self.weights[n]) if g is None else g
                self.momentum[n].lerp_(g, 0.05)
                grads.append(torch.lerp(g, self.momentum[n], 0.95))
            update = orthogonal(torch.stack(grads)) * max(1.0, shape[0] / shape[1]) ** 0.5
            for n, u in zip(names, update, strict=True):
                if self.weights[n].grad is not None:
                    step = MUON_RATE * rate * (vision_rate if n.startswith("vision") else 1.0)
                    self.weights[n].mul_(1 - 0.05 * step).sub_(u, alpha=step)
        for group in self.adam.param_groups:
            group["lr"] = ADAM_RATE * rate * (vision_rate if group["name"].startswith("vision") else 1.0)
        self.adam.step()
        for p in self.weights.values():
            p.grad = None

    def state(self) -> dict:
        return {"momentum": self.momentum, "adam": self.adam.state_dict()}

    def load(self, state: dict) -> None:
        self.momentum = state["momentum"]
        self.adam.load_state_dict(state["adam"])


def orthogonal(g: Tensor) -> Tensor:
    """The nearest orthogonal matrices to a stack [n, r, c], about, by five Newton-Schulz steps."""
    x = g.bfloat16()
    x = x.mT if g.shape[1] > g.shape[2] else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if g.shape[1] > g.shape[2] else x).float()


def enlarge(weights: Weights, old: Size, new: Size) -> None:
    """Interpolate the position embeddings to the new grid, as the published 448 px checkpoints were begun."""
    name = "vision_tower.vision_model.embeddings.position_embedding.weight"
    grid = weights[name].detach().T.reshape(1, -1, old.grid, old.grid)
    weights[name] = F.interpolate(grid, (new.grid, new.grid), mode="bicubic").flatten(2)[0].T.contiguous().requires_grad_()


def average_gradients(weights: Weights, extra: list[float]) -> list[float]:
    """Average every gradient over the workers, and sum some numbers, in one exchange."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in weights.values()]
    flat = torch.cat([*(g.flatten() for g in parts), torch.tensor(extra) * WORKERS])
    dist.all_reduce(flat)
    flat /= WORKERS
    for p, g in zip(weights.values(), flat[: -len(extra)].split([p.numel() for p in weights.values()]), strict=True):
        p.grad = g.view_as(p) if p.grad is not None else None
    return flat[-len(extra) :].tolist()


def run(phase: Phase, weights: Weights, optimizer: Optimizer, scratch: Path, state: dict, rank: int, save) -> None:
    size = replace(Size(), resolution=phase.resolution)
    masks = None
    if phase.questions:
        while not (scratch / "vqvae.pt").exists():
            time.sleep(5)
        masks = MaskAutoencoder()
        masks.load_state_dict(torch.load(scratch / "vqvae.pt", weights_only=True))
    tokenizer = train_tokenizer() if phase.questions else None
    source = batches(
        scratch / "shards", size, tokenizer, masks, phase.images, phase.questions, seed=WORKERS * state["step"] + rank
    )
    last, saved, log, count = time.monotonic(), time.monotonic(), {}, 0
    while (progress := state["seconds"] / (60 * phase.minutes)) < 1:
        batch = next(source)
        w = {k: p.bfloat16() for k, p in weights.items()}
        pixels = (batch.pixels.permute(0, 3, 1, 2).bfloat16() / 127.5 - 1).contiguous()
        features = vision(w, size, pixels)
        loss, seen = dense_loss(w, size, features, batch)
        if phase.mode != "dense":
            image, blur = project(w, features), phase.blur[0] * (phase.blur[1] / phase.blur[0]) ** progress
            if phase.mode == "shared":
                hidden = decode_shared(w, size, image, batch.questions)
            else:
                hidden = [decode_exact(w, size, image, q, softcap=False) for q in batch.questions]
            answers, more = answer_loss(w, size, hidden, batch, blur)
            loss, seen = answers + DENSE_WEIGHT * loss, {"answers": answers.item(), **seen, **more}
        loss.backward()
        now = time.monotonic()
        (state["seconds"],) = average_gradients(weights, [state["seconds"] + min(now - last, 30.0) if rank == 0 else 0.0])
        last = now
        rate = phase.rate[0] + (phase.rate[1] - phase.rate[0]) * progress
        optimizer.step(rate * min(1.0, (1 + state["phase_step"]) / 50), phase.vision_rate)
        state["step"] += 1
        state["phase_step"] += 1
        count += 1
        for k, v in {"loss": loss.item(), **seen}.items():
            log[k] = log.get(k, 0.0) + v
        if count == 50 and rank == 0:
            shown = " ".join(f"{k} {v / count:.3f}" for k, v in log.items())
            print(
                f"{phase.name} {progress:.1%} step {state['phase_step']} {state['seconds'] / state['phase_step']:.3f} s/step: {shown}",
                flush=True,
            )
            log, count = {}, 0
        if rank == 0 and now - saved > 120:
            save()
            saved = time.monotonic()


def work(rank: int, scratch: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{(scratch / 'rendezvous').absolute()}", rank=rank, world_size=WORKERS)
    torch.manual_seed(0)
    file = scratch / "train.pt"
    state = {"phase": 0, "seconds": 0.0, "step": 0, "phase_step": 0}
    weights = {**initial_weights(Size(), LOC), **initial_heads(Size().vision_width)}
    stored = torch.load(file, weights_only=True) if file.exists() else None
    if stored:
        weights, state = stored["weights"], stored["state"]
    for p in weights.values():
        p.requires_grad_()
    optimizer = Optimizer(weights)
    if stored:
        optimizer.load(stored["optimizer"])

    def save() -> None:
        temporary = file.with_suffix(".part")
        torch.save({"weights": weights, "state": state, "optimizer": optimizer.state()}, temporary)
        temporary.rename(file)

    for number, phase in enumerate(PHASES):
        if number < state["phase"]:
            continue
        if number and phase.resolution != PHASES[number - 1].resolution and state["phase_step"] == 0:
            enlarge(
                weights, replace(Size(), resolution=PHASES[number - 1].resolution), replace(Size(), resolution=phase.resolution)
            )
            optimizer = Optimizer(weights)
        run(phase, weights, optimizer, scratch, state, rank, save)
        if rank == 0:
            torch.save({k: v.detach() for k, v in weights.items()}, scratch / f"{phase.name}.pt")
        if rank == 0 and (number + 1 == len(PHASES) or PHASES[number + 1].resolution != phase.resolution):
            write_checkpoint(weights, replace(Size(), resolution=phase.resolution), scratch / f"tiny-{phase.resolution}")
        state |= {"phase": number + 1, "seconds": 0.0, "phase_step": 0}
        if rank == 0:
            save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scratch", type=Path)
    scratch = parser.parse_args().scratch
    (scratch / "rendezvous").unlink(missing_ok=True)
    mp.spawn(work, (scratch,), nprocs=WORKERS)


if __name__ == "__main__":
    main()
