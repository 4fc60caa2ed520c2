"""tools/probe.py: the two classifiers of frozen features."""
import math
import shutil
from functools import partial

import pytest
import torch
from helpers import rows, seeded

from model import SIZES, VisionTransformer
from support.launch import InputError
from tools import probe


def test_a_linear_probe_classifies_what_is_separable():
    generator = seeded()
    centres = torch.randn(5, 16, generator=generator)
    labels = torch.arange(300) % 5
    features = centres[labels] + 0.3 * torch.randn(300, 16, generator=generator)

    def accuracy(features, train_labels):
        found = probe.linear_probe(features[:200], train_labels, features[200:], 5, steps=200)
        return (found == labels[200:]).float().mean()

    for scale in (100, 0.001):                              # it standardises the features
        assert accuracy(scale * features + 7, labels[:200]) > 0.95
    shuffled = labels[:200][torch.randperm(200, generator=generator)]
    assert accuracy(features, shuffled) < 0.5               # the control


def test_knn_against_a_plain_loop():
    train, val = torch.randn(240, 8, generator=seeded()).split([40, 200])
    labels = torch.arange(40) % 3
    expected = []
    for row in val:
        cosines = [(torch.dot(row, other) / row.norm() / other.norm()).item() for other in train]
        votes = [0.0] * 3
        for cosine, label in sorted(zip(cosines, labels.tolist(), strict=True))[-20:]:
            votes[label] += math.exp(cosine / 0.07)
        expected.append(votes.index(max(votes)))
    assert probe.knn(train, labels, val, 3).tolist() == expected


def found(*flags):
    return probe.main(probe.get_args([*map(str, flags), "--workers", "0", "--amp", "fp32"]))


@pytest.mark.parametrize("stage, kind", [
    ("teacher", "knn"), ("pretrain", "linear"), ("finetune", "knn")])
def test_a_run_is_probed_on_its_own_data(stage, kind, chain, monkeypatch):
    monkeypatch.setattr(probe, "linear_probe", partial(probe.linear_probe, steps=20))
    row = found(shutil.copytree(getattr(chain, stage), "run"), kind)
    assert (row["data"], row["images"]) == ("synthetic:64", 40)
    assert 0 < row["top1"] < 100
    assert [line["top1"] for line in rows() if "probe" in line] == [row["top1"]]


def test_few_labels_are_few(chain, monkeypatch):
    seen, knn = [], probe.knn
    monkeypatch.setattr(probe, "knn", lambda *all: seen.append(len(all[0])) or knn(*all))
    run = shutil.copytree(chain.teacher, "run")
    found(run, "knn")
    found(run, "knn", "--label-fraction", "0.1")
    assert seen == [64, 10]                                 # at least one of each class


def test_a_file_of_another_project(monkeypatch):
    monkeypatch.setitem(SIZES, "base", SIZES["nano"])
    network = VisionTransformer(224, 16, **SIZES["nano"], positions="block", layer_scale=0.1)
    torch.save(dict(model=network.state_dict()), "beit.pth")
    row = found("beit.pth", "knn", "--data", "synthetic:10", "--batch-size", "10")
    assert row["data"] == "synthetic:10"


def test_a_tokenizer_is_refused(chain):
    with pytest.raises(InputError, match="tokenizer"):
        found(chain.tokenizer, "knn")
