"""What the paper does not speak of. A reader beside the paper may skip it.

launch      start and end of a stage, exit codes, signals, ranks, device, precision, seeds
flags       the command line: flags in their ranges, over the values of a recipe
checkpoint  one file: a digest, an atomic write, the newest sound file of a folder
recipes     the recipes that are not the paper's: photos, cifar, demo
run         a run: its folder, how it goes on, what is due, the check of a step, its log
weights     networks from weights: our own runs, and files of other projects
scenes      the drawn dataset of the demo and the tests
"""
