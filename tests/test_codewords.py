"""tools/codewords.py: how semantic codewords are, on those of a known meaning."""
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import rows
from PIL import Image
from torch import nn

from support import weights
from tools import codewords


def test_codewords_are_average_pooled(chain):
    """PeCo's Table 4: the mean of the vectors of an image's codes."""
    args = SimpleNamespace(data="synthetic:20", image_size=32, eval_crop=1.0, batch_size=8,
                           workers=0, amp="fp32")
    network = weights.load(chain.tokenizer)
    features, labels = codewords.pooled_codewords(args, network, "train", torch.device("cpu"))
    assert features.shape == (20, 32)
    assert labels.tolist() == 2 * list(range(10))
    images = torch.cat([images for images, _ in codewords.batches(args, "train")])
    for codes, feature in zip(network.encode(images), features, strict=True):
        assert len(codes.unique()) > 1
        expected = sum(network.quantizer.codebook[code] for code in codes.flatten()) / 16
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
            image = folder / "shades" / split / str(shade) / "image.png"
            image.parent.mkdir(parents=True)
            Image.new("RGB", (32, 32), (round(shade / 9 * 255),) * 3).save(image)
    trained = dict(data="shades", image_size=32, eval_crop=1.0, perceptual="any")
    monkeypatch.setattr(codewords.checkpoint, "load", lambda path, stages: dict(args=trained))
    monkeypatch.setattr(codewords, "load", lambda path, stages: Shades())
    monkeypatch.setattr(codewords, "linear_probe", partial(codewords.linear_probe, steps=200))
    monkeypatch.setattr(codewords, "perceptual_network", lambda source: (None, None))
    monkeypatch.setattr(codewords, "PerceptualLoss", lambda network: nn.MSELoss())
    codewords.main(codewords.get_args([".", "--classifier", "any", "--workers", "0"]))
    (row,) = rows(".")
    assert row["codewords"] is True
    assert (row["linear"], row["originals"], row["images"]) == (100, 100, 10)
    assert row["reconstructions"] == 10
    distance = sum((2 * i / 9) ** 2 for i in range(10)) / 10
    assert row["distance"] == pytest.approx(distance, abs=1e-3)     # pixels have 8 bits
