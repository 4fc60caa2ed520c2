"""tools/codewords.py: how semantic codewords are, on those of a known meaning."""
import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from model import VQTokenizer
from tools import codewords


def test_codewords_are_average_pooled():
    """PeCo's Table 4: the mean of the vectors of an image's codes."""
    torch.manual_seed(0)
    network = VQTokenizer(32, channels=(16, 16, 16), codebook_size=8, code_dim=4)
    args = SimpleNamespace(data="synthetic:20", image_size=32, eval_crop=1.0, batch_size=8,
                           workers=0, amp="fp32")
    images = torch.cat([images for images, _ in codewords.batches(args, "train")])
    network(images)
    network.quantizer.initialize(torch.Generator())         # so that images have several codes
    network.eval()
    cpu = torch.device("cpu")
    features, labels = codewords.pooled_codewords(args, network, "train", cpu)
    assert features.shape == (20, 4)
    assert labels.tolist() == 2 * list(range(10))
    for codes, feature in zip(network.encode(images), features, strict=True):
        assert len(codes.unique()) > 1
        expected = sum(network.quantizer.codebook[code] for code in codes.flatten()) / 64
        torch.testing.assert_close(feature, expected)


class Shades(nn.Module):
    """A tokenizer whose code is an image's shade, but which reconstructs it black; its classifier.
    """

    def __init__(self):
        super().__init__()
        self.quantizer = SimpleNamespace(lookup=self.lookup)

    def encode(self, images):
        shade = ((images.mean((1, 2, 3)) + 1) / 2 * 9).round().long()
        return shade.view(-1, 1, 1).expand(-1, 2, 2)

    def lookup(self, codes):
        return F.one_hot(codes, 10).float().permute(0, 3, 1, 2)

    def decode(self, codes):
        return torch.full((len(codes), 3, 32, 32), -1.0)

    def forward(self, images):
        return F.one_hot(self.encode(images)[:, 0, 0], 10)


def test_codewords_of_known_meaning(folder, monkeypatch):
    for split in ("train", "val"):
        for shade in range(10):
            target = folder / "shades" / split / str(shade)
            target.mkdir(parents=True)
            image = Image.new("RGB", (32, 32), (round(shade / 9 * 255),) * 3)
            for i in range(4):
                image.save(target / f"{i}.png")
    trained = dict(data="shades", image_size=32, eval_crop=1.0, perceptual="any")
    monkeypatch.setattr(codewords.checkpoint, "load", lambda path, stages: dict(args=trained))
    monkeypatch.setattr(codewords, "load", lambda path, stages: Shades())
    few = partial(codewords.linear_probe, steps=200)
    monkeypatch.setattr(codewords, "linear_probe", few)
    monkeypatch.setattr(codewords, "perceptual_network", lambda source: (None, None))
    monkeypatch.setattr(codewords, "PerceptualLoss", lambda network: nn.MSELoss())
    codewords.main(codewords.get_args([str(folder), "--classifier", "any", "--workers", "0"]))
    row = json.loads((folder / "log.jsonl").read_text())
    assert row["codewords"] is True
    assert (row["linear"], row["originals"], row["images"]) == (100, 100, 40)
    assert row["reconstructions"] == 10
    distance = sum((2 * i / 9) ** 2 for i in range(10)) / 10
    assert row["distance"] == pytest.approx(distance, abs=1e-3)     # pixels have 8 bits
