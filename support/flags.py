"""The command line: flags in their ranges, which win over the values of a recipe."""
import argparse
import math
import re
import sys

from support.launch import say, warn


def within(kind, interval):
    """An argument's type: an int or a float (kind) in an interval such as "[0, 1)", or "(0, inf)".

    The limits beside the flags that have no source are our choice.
    """
    left, low, high, right = re.fullmatch(r"([\[(])(.+), (.+)([\])])", interval).groups()
    low, high = [math.inf if limit == "inf" else kind(limit) for limit in (low, high)]

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan                                # in no interval
        above = value > low or (left == "[" and value == low)
        below = value < high or (right == "]" and value == high)
        if above and below:
            return value
        noun = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"{text}: a {noun} in {interval} is needed")
    return parse


# Kinds of numbers that many flags are.
count = within(int, "[0, inf)")
positive = within(int, "[1, inf)")
amount = within(float, "[0, inf)")
rate = within(float, "[0, 1)")
share = within(float, "[0, 1]")


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


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Without "(default: None)": where there is no default, the text says what happens."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


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
                   help="set of defaults: the paper's in the script, others in support/recipes.py")
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
    shared.add_argument("--seed", type=within(int, f"[0, {2 ** 63})"), default=0,
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
    del args.help
    if given.lr is None:                                    # a --lr of the user's is taken as typed
        args.lr *= args.batch_size / recipe["batch_size"]
    return args
