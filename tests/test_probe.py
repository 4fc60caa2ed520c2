"""tools/probe.py: the two classifiers of frozen features."""
import json
import math
import shutil

import pytest
import torch

from model import SIZES, VisionTransformer
from support.launch import InputError
from tools import probe


def test_a_linear_probe_classifies_what_is_separable():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(5, 16, generator=generator)
    labels = torch.arange(300) % 5
    rows = centres[labels] + 0.3 * torch.randn(300, 16, generator=generator)

    def accuracy(rows, train_labels):
        found = probe.linear_probe(rows[:200], train_labels, rows[200:], 5, steps=200)
        return (found == labels[200:]).float().mean()

    for scale in (100, 0.001):                              # it standardises the features
        assert accuracy(scale * rows + 7, labels[:200]) > 0.95
    shuffled = labels[:200][torch.randperm(200, generator=generator)]
    assert accuracy(rows, shuffled) < 0.5


def test_knn_against_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    train = torch.randn(40, 8, generator=generator)
    val = torch.randn(20, 8, generator=generator)
    labels = torch.arange(40) % 3
    expected = []
    for row in val:
        near = []
        for other, label in zip(train, labels.tolist(), strict=True):
            cosine = torch.dot(row, other) / row.norm() / other.norm()
            near.append((cosine.item(), label))
        votes = [0.0] * 3
        for cosine, label in sorted(near)[-20:]:
            votes[label] += math.exp(cosine / 0.07)
        expected.append(votes.index(max(votes)))
    assert probe.knn(train, labels, val, 3).tolist() == expected


def found(*flags):
    return probe.main(probe.get_args([*map(str, flags), "--workers", "0", "--amp", "fp32"]))


@pytest.mark.parametrize("stage, kind", [
    ("teacher", "knn"), ("pretrain", "linear"), ("finetune", "knn")])
def test_a_run_is_probed_on_its_own_data(stage, kind, chain, folder, monkeypatch):
    whole = probe.linear_probe
    monkeypatch.setattr(probe, "linear_probe", lambda *features: whole(*features, steps=20))
    run = shutil.copytree(getattr(chain, stage), folder / "run")
    row = found(run, kind)
    assert (row["data"], row["images"]) == ("synthetic:64", 40)
    assert 0 < row["top1"] < 100
    logged = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["top1"] for line in logged if "probe" in line] == [row["top1"]]


def test_few_labels_are_few(chain, folder, monkeypatch):
    seen = []
    whole = probe.knn
    monkeypatch.setattr(probe, "knn", lambda *all: seen.append(len(all[0])) or whole(*all))
    run = shutil.copytree(chain.teacher, folder / "run")
    found(run, "knn")
    found(run, "knn", "--label-fraction", "0.1")
    assert seen == [64, 10]                                 # at least one of each class


def test_a_file_of_another_project(folder, monkeypatch):
    monkeypatch.setitem(SIZES, "base", SIZES["nano"])
    network = VisionTransformer(224, 16, **SIZES["nano"], positions="block", layer_scale=0.1)
    torch.save(dict(model=network.state_dict()), "beit.pth")
    row = found("beit.pth", "knn", "--data", "synthetic:10", "--batch-size", "10")
    assert row["data"] == "synthetic:10"


def test_a_tokenizer_is_refused(chain):
    with pytest.raises(InputError, match="tokenizer"):
        found(chain.tokenizer, "knn")
