"""Two ranks against one process with the same global batch."""
import signal

import pytest
import ranks
import torch
from conftest import COMMON, OWN, ROOT, run
from helpers import files, log, newest, printed, torchrun


def finish(*command):
    with torchrun(*command) as process:
        assert process.wait(600) == 0, printed()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What one process computes, and what each of two ranks does."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        finish(ROOT / "tests" / "ranks.py", folder)
    both = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
    return [ranks.checks(folder / "one"), *both]


def test_codebook_is_that_of_one_process(results):
    one, *both = [result["quantizer"] for result in results]
    assert all(one[f"revived {step}"].any() for step in (1, 2))     # else nothing is shown
    for key, value in one.items():
        assert torch.equal(both[0][key], both[1][key]), key         # the same on both, to the bit
        assert torch.allclose(both[0][key].double(), value.double(), rtol=1e-12, atol=1e-12), key


def test_batch_norm_is_over_the_global_batch(results):
    one, *both = [result["batch_norm"] for result in results]
    expected = ranks.batch_norm(torch.nn.BatchNorm1d(5))
    for key, value in expected.items():
        shared = [result[key] for result in both]
        if key in ("output", "gradient"):                   # of each rank's own rows
            shared = [torch.cat(shared)]
        for found in (one[key], *shared):
            assert torch.allclose(found, value, rtol=1e-10, atol=1e-12), key


def test_contrastive_loss_and_gradients(results):
    one, *both = [result["moco"] for result in results]
    assert sum(bool(gradient.abs().max() > 1e-3) for gradient in one.values()) > 30
    for key, value in one.items():                          # the loss is taken in fp32
        for result in both:
            error = (result[key] - value).abs().max()
            # 1e-12: the biases before a batch norm have no gradient
            assert error < 1e-5 * value.abs().max() + 1e-12, key


def test_evaluations_count_every_image_once(results):
    one, *both = [result["evaluations"] for result in results]
    assert one["labels"]["images"] == 23
    assert 0 < one["labels"]["top1"] < one["labels"]["top5"]
    assert one["masks"]["images"] == 7
    assert 0 < one["masks"]["miou"] < one["masks"]["pixel_accuracy"] < 100
    assert all(result == one for result in both)            # integers are counted: to the bit
    if "boxes" in one:
        assert (one["boxes"]["box_ap"], one["boxes"]["mask_ap"]) == pytest.approx((100, 100))


def test_trouble_on_one_rank_stops_all(results):
    first, second = [result["trouble"] for result in results[1:]]
    assert first == second
    assert first[0] == (dict(loss=1.5, grad_norm=1.0), signal.SIGTERM)      # the means, the signal
    for message, name in zip(first[1:], ("loss", "grad_norm"), strict=True):
        assert message.startswith(f"{name} not finite at step 3 on ranks [1]")


def test_storage_that_is_not_shared_is_refused(results):
    one, *both = [result["storage_that_is_not_shared"] for result in results]
    assert one == 5                                         # the control: it is found
    assert all("[0, 5]" in message for message in both)


def test_pretraining_on_two_ranks(chain):
    flags = [*chain.inputs["pretrain"], "--steps", "3", "--drop-path", "0"]
    run("pretrain", *flags, "--output", "one")
    finish(ROOT / "pretrain.py", *COMMON, *OWN["pretrain"], *flags, "--accumulate", "2",
           "--output", "two")
    one, two = newest("one"), newest("two")
    assert list(one["model"]) == list(two["model"])
    for key, value in one["model"].items():
        assert torch.allclose(two["model"][key], value, atol=1e-4), key
    assert files("two") == ["masked.png", "step-00000003.pt"]
    (own,), (shared,) = log("one", "val"), log("two", "val")
    assert own["loss"] == pytest.approx(shared["loss"], rel=1e-4)
    assert own["accuracy"] == pytest.approx(shared["accuracy"], abs=0.01)
