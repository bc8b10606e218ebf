"""Barlow Twins on a folder of images, the whole idea on one screen. Copy it with the two files that it needs:

mkdir mine && cp examples/minimal.py losses/barlow.py data/augment.py mine/
cd mine && python minimal.py PATCHES    # every .jpg, .png and .tif below PATCHES, 8-bit RGB
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torchvision
from augment import Recipe, draw, view
from barlow import barlow_twins_loss
from PIL import Image
from torch import nn

SIZE, BATCH, EPOCHS, RATE = 64, 128, 20, 1e-3  # pixels, images, times through the images, of AdamW
RECIPE = Recipe(area=(0.2, 1.0), jitter=0.1, blur_probability=0.0, quarter_turns=True)
FORMATS = {".jpg", ".jpeg", ".png", ".tif"}


def read(folder: Path) -> torch.Tensor:
    """uint8 (n, 3, SIZE, SIZE) of all images below `folder`."""
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in FORMATS)
    if not files:
        sys.exit(f"{folder}: no .jpg, .png or .tif there; python minimal.py FOLDER reads another folder")
    arrays = [np.asarray(Image.open(f).convert("RGB").resize((SIZE, SIZE))) for f in files]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def projector(width: int) -> nn.Sequential:
    """Three layers, BatchNorm and ReLU between them, on the backbone's 512 features."""
    return nn.Sequential(
        nn.Linear(512, width, bias=False),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, width, bias=False),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, width),
    )


device = "cuda" if torch.cuda.is_available() else "cpu"
generator = torch.Generator().manual_seed(0)
images = read(Path(sys.argv[1] if sys.argv[1:] else "PATCHES"))
std, mean = (values.tolist() for values in torch.std_mean(images / 255, (0, 2, 3)))

backbone = torchvision.models.resnet18()
backbone.fc = nn.Identity()
model = nn.Sequential(backbone, projector(1024)).to(device, memory_format=torch.channels_last)
optimizer = torch.optim.AdamW(model.parameters(), RATE)
batches = max(1, len(images) // BATCH)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, EPOCHS * batches)

for epoch in range(EPOCHS):
    total = 0.0
    for rows in torch.randperm(len(images), generator=generator)[: batches * BATCH].chunk(batches):
        batch = images[rows].to(device)
        draws = [draw(len(rows), SIZE, SIZE, generator, RECIPE) for _ in range(2)]
        z1, z2 = (model(view(batch, d, SIZE, mean, std)) for d in draws)  # (n, 1024)
        loss = barlow_twins_loss(z1, z2, lambda_=0.02)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        total += float(loss.detach()) / batches
    print(f"epoch {epoch + 1}/{EPOCHS}  loss {total:.2f}", flush=True)
torch.save(backbone.state_dict(), "backbone.pth")  # torchvision's key names
