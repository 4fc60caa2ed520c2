"""The command line: flags in their ranges, which win over the values of a recipe."""
import argparse
import contextlib
import math
import sys

import torch

from support.launch import InputError, refuse_longer_warmup, say, warn

# No flag means more than this, and seeds alone are larger. It and whatever limits stand beside the
# flags without a source are our choice: beyond them no machine of today runs.
LARGEST = 10 ** 9


def number(kind, above=-math.inf, at_least=-math.inf, below=math.inf, at_most=LARGEST):
    """An argument's type: an int or a float (kind) within limits. NaN and infinities never are."""
    limits = {"above": above, "of at least": at_least, "below": below, "at most": at_most}

    def parse(text):
        value = math.nan
        with contextlib.suppress(ValueError):
            value = kind(text)
        if kind is float and abs(value) < torch.finfo(torch.float32).tiny:
            value = 0.0                                     # in fp32 it is
        if above < value < below and at_least <= value <= at_most:
            return value
        needed = []
        for word, limit in limits.items():
            if abs(limit) < LARGEST or limit == at_most < value:    # LARGEST where it was passed
                needed.append(f"{word} {limit}")
        noun = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text}: {noun} {' and '.join(needed)} is needed")
    return parse


# Kinds of numbers that many flags are.
count = number(int, at_least=0)
positive = number(int, at_least=1)
amount = number(float, at_least=0)
rate = number(float, at_least=0, below=1)
share = number(float, at_least=0, at_most=1)


class Parser(argparse.ArgumentParser):
    """Tells what is wrong in one line, without the usage. description: its first paragraph counts.

    There is none where Python leaves docstrings out (-OO).
    """

    def __init__(self, prog, description=None, **keywords):
        first = (description or "").partition("\n\n")[0]
        super().__init__(prog=prog, description=first, **keywords)

    def error(self, message):
        if message.startswith("argument "):                 # "argument --lr: 0: a number above 0 …"
            message = message.removeprefix("argument ").replace(": ", " ", 1)
        warn(f"{self.prog}: {message}")
        sys.exit(2)

    def print_help(self, file=None):
        say(self.format_help().rstrip())


class HelpFormatter(argparse.HelpFormatter):
    """Adds defaults to help texts, with three digits; none where the text says what happens."""

    def _get_help_string(self, action):
        default = action.default
        if default is None or default is False or not action.option_strings:
            return action.help
        values = default if isinstance(default, list) else [default]
        shown = (f"{value:.3g}" if isinstance(value, float) else str(value) for value in values)
        return f"{action.help} (default: {' '.join(shown)})"


def parser(stage, doc):
    """An argument parser with the flags that every stage has. The stage adds its own."""
    p = Parser(
        f"{stage}.py", doc,
        add_help=False,                                # parse() prints it, when it knows the recipe
        formatter_class=HelpFormatter,
    )
    p.set_defaults(stage=stage)
    p.add_argument("--help", "-h", action="store_true",
                   help="print this, with the recipe's defaults")
    p.add_argument("--recipe", default="paper",
                   help="set of defaults, a key of RECIPES at the top of the script")
    shared = p.add_argument_group("flags of every stage")
    shared.add_argument("--output", help="folder of the checkpoints and the log")
    shared.add_argument("--batch-size", type=positive,
                        help="images of a step, over all ranks and micro-batches")
    shared.add_argument("--accumulate", type=positive, default=1,
                        help="micro-batches of a step on each rank; more of them take less memory "
                             "(teacher.py then has fewer negatives)")
    shared.add_argument("--epochs", type=positive, help="passes over the training set")
    shared.add_argument("--steps", type=positive, help="optimizer steps, in place of --epochs")
    shared.add_argument("--lr", type=amount,
                        help="peak learning rate, taken as it is; without this flag, the recipe's "
                             "is scaled in proportion to --batch-size")
    shared.add_argument("--seed", type=number(int, at_least=0, at_most=2 ** 63 - 1), default=0,
                        help="seed of weights, sample order, augmentation and masks")
    shared.add_argument("--amp", choices=["auto", "bf16", "fp32"], default="auto",
                        help="precision; auto is bf16 autocast on a GPU that has it, else fp32")
    shared.add_argument("--compile", action="store_true", help="torch.compile the network")
    shared.add_argument("--save-every", type=positive, default=1,
                        help="epochs from one checkpoint, and evaluation, to the next")
    shared.add_argument("--log-every", type=positive, default=50,
                        help="steps from one line of log.jsonl to the next")
    shared.add_argument("--resume", choices=["auto", "force"], default="auto",
                        help="auto: a run found in --output goes on if its arguments are the same; "
                             "force: even if they differ")
    return p


def parse(p, recipes, argv=None):
    """The arguments: flags over the recipe's values. The recipe's own lr scales with the batch."""
    given = p.parse_args(argv)
    if given.recipe not in recipes:
        p.error(f"--recipe {given.recipe}: choose from {', '.join(recipes)}")
    if given.epochs and given.steps:
        p.error("--epochs and --steps: one of them")
    recipe = recipes[given.recipe]
    p.set_defaults(output=f"runs/{given.recipe}/{given.stage}", **recipe)
    if given.epochs:
        p.set_defaults(steps=None)                          # of a recipe that counts in steps
    if given.help:
        p.print_help()
        sys.exit(0)
    args = p.parse_args(argv)
    if args.steps:                                          # total_steps looks at the other runs
        try:
            refuse_longer_warmup(given, "--warmup-steps", args.steps, "steps")
        except InputError as error:
            p.error(str(error))
    del args.help
    if given.lr is None:                                    # a --lr of the user's is taken as typed
        args.lr *= args.batch_size / recipe["batch_size"]
    return args
