"""What `make demo` says of its figures. That it runs to its end is seen by .ci/run."""
import numpy as np
import pytest

from support import scenes
from tools import demo


def test_exceeds_by_two_standard_errors_of_the_difference():
    noisy, even = [50.0, 54.0, 58.0], [44.0, 45.0, 46.0]    # means 54, 45; errors 2.31, 0.58
    assert demo.exceeds(noisy, even)                        # 9 > 2 · 2.38
    assert not demo.exceeds(noisy, [value + 4.5 for value in even])
    assert not demo.exceeds(even, noisy)


@pytest.mark.parametrize("arm", ["peco", "pixel"])
def test_chain_reads_what_it_has_written_and_differs_in_the_codes_alone(arm):
    """λ is the paper's 1 for PeCo and 0 for pixel codes; nothing else of the recipe differs."""
    runs = [(stage, run, stage.get_args(["--recipe", "demo", *flags.split()]))
            for stage, run, flags in demo.chain(arm)]
    written = {"none"}
    for _, run, args in runs:
        for read in ("init", "tokenizer", "perceptual"):
            uses = read != "perceptual" or args.perceptual_weight if hasattr(args, read) else False
            assert not uses or getattr(args, read) in written
        written.add(f"runs/demo/{run}")
    tokenizers = [args for _, run, args in runs if run.startswith("tokenizer")]
    assert [args.perceptual_weight for args in tokenizers] == [1.0 if arm == "peco" else 0.0]


def test_the_perceptual_network_sees_no_shape_that_is_asked_for():
    others, clutter = scenes.KINDS["synthetic-others"]
    assert len(others) == 16 and set(clutter) <= set(others)
    v, u = np.mgrid[0:64, 0:64].astype(np.float32) / 24 - 1.33
    for other in others.values():
        for shape in scenes.SHAPES.values():
            one, two = other(u, v), shape(u, v)
            assert one.any() and (one & two).sum() / (one | two).sum() < 0.8
