# SPDX-License-Identifier: Apache-2.0
"""Train the mask tokenizer: 64 × 64 masks as 4 × 4 codes of 128, with a decoder in the layout of `vae-oid.npz`.

VQ-VAE (van den Oord et al., 2017) with a codebook kept as moving averages. Each code is a function of its own 16 × 16
pixels only, so that a code can be predicted from the part of the picture that it describes.

python tools/tiny/vqvae.py SCRATCH --minutes 4
"""

import argparse
import pickle
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

CODES, WIDTH = 128, 512


class ResidualBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        conv = [nn.Conv2d(channels, channels, k, padding=k // 2) for k in (3, 3, 1)]
        self.net = nn.Sequential(conv[0], nn.ReLU(), conv[1], nn.ReLU(), conv[2])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.net(x)


class MaskAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 256, 16, 16), nn.GELU(), nn.Conv2d(256, 256, 1), nn.GELU(), nn.Conv2d(256, WIDTH, 1)
        )
        up = [nn.ConvTranspose2d(a, b, 4, 2, 1) for a, b in ((128, 128), (128, 64), (64, 32), (32, 16))]
        layers: list[nn.Module] = [nn.Conv2d(WIDTH, 128, 1), nn.ReLU(), ResidualBlock(128), ResidualBlock(128)]
        for conv in up:
            layers += [conv, nn.ReLU()]
        self.decoder = nn.Sequential(*layers, nn.Conv2d(16, 1, 1))
        self.register_buffer("embedding", torch.randn(CODES, WIDTH))
        self.register_buffer("count", torch.ones(CODES))
        self.register_buffer("total", self.embedding.clone())

    def codes(self, z: torch.Tensor) -> torch.Tensor:
        """[B, 512, 4, 4] -> [B, 16], row by row"""
        return torch.cdist(z.flatten(2).mT, self.embedding[None]).argmin(-1)

    def forward(self, masks: torch.Tensor) -> torch.Tensor:
        """masks [B, 1, 64, 64] in -1..1 -> loss"""
        z = self.encoder(masks)
        codes = self.codes(z.float())
        q = self.embedding[codes].mT.reshape(z.shape)
        if self.training:
            self._move_codebook(z.detach().float().flatten(2).mT.reshape(-1, WIDTH), codes.flatten())
        decoded = self.decoder(z + (q - z).detach())
        return F.mse_loss(decoded, masks) + 0.25 * F.mse_loss(z, q)

    @torch.no_grad()
    def _move_codebook(self, z: torch.Tensor, codes: torch.Tensor) -> None:
        hot = F.one_hot(codes, CODES).float()
        self.count.lerp_(hot.sum(0), 0.01)
        self.total.lerp_((hot.T @ z).float(), 0.01)
        dead = self.count < 0.05
        if dead.any():  # a code nothing uses starts again where some patch is
            fresh = z[torch.randint(len(z), (int(dead.sum()),))]
            self.total[dead], self.count[dead] = fresh, 1.0
        self.embedding.copy_(self.total / self.count[:, None])


def masks_of(folder: Path) -> torch.Tensor:
    """Every mask of the shards that are there: uint8 [N, 512], bits packed."""
    rows = []
    for file in sorted(folder.glob("*.pickle")):
        for questions in pickle.loads(file.read_bytes())["questions"]:
            rows += [targets[0][2] for task, _, _, targets in questions if task == "segment"]
    return torch.from_numpy(np.stack(rows))


def unpack(rows: torch.Tensor) -> torch.Tensor:
    bits = np.unpackbits(rows.numpy(), axis=1).reshape(-1, 1, 64, 64)
    return torch.from_numpy(bits.astype(np.float32) * 2 - 1)


def export(model: MaskAutoencoder, file: Path) -> None:
    """Write codebook and decoder under the names of `vae-oid.npz`, in half precision."""
    arrays = {"_vq_vae._embedding": model.embedding, **{f"decoder.{k}": v for k, v in model.decoder.state_dict().items()}}
    np.savez_compressed(file, **{k: v.detach().numpy().astype(np.float16) for k, v in arrays.items()})


@torch.no_grad()
def intersection_over_union(model: MaskAutoencoder, masks: torch.Tensor) -> float:
    decoded = model.decoder(model.embedding[model.codes(model.encoder(masks))].mT.reshape(-1, WIDTH, 4, 4)) > 0
    truth = masks > 0
    return float(((decoded & truth).sum((1, 2, 3)) / (decoded | truth).sum((1, 2, 3))).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--minutes", type=float, default=4)
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = masks_of(args.scratch / "shards")
    print(f"{len(rows)} masks")
    held_out, rows = unpack(rows[:512]), rows[512:]
    model = MaskAutoencoder().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    start, step = time.monotonic(), 0
    while (progress := (time.monotonic() - start) / (60 * args.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, step / 50) * min(1.0, 3 * (1 - progress))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(unpack(rows[torch.randint(len(rows), (128,))]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            model.eval()
            used = int((model.count > 0.05).sum())
            print(
                f"{progress:.0%} step {step} loss {loss:.4f} IoU {intersection_over_union(model, held_out):.4f} codes {used}",
                flush=True,
            )
            model.train()
        step += 1
    model.eval()
    torch.save(model.state_dict(), args.scratch / "vqvae.pt")
    export(model, args.scratch / "vae-oid.npz")
    print(f"IoU {intersection_over_union(model, held_out):.4f}; {(args.scratch / 'vae-oid.npz').stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
