"""Images in folders: with labels, a folder for each class; or without, flat or nested.

Hidden files and folders do not count. Links are followed, but of one listing each folder is part
once, so that a link to a parent or a second link to a folder adds no image.
"""
import os
from pathlib import Path

from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from support.launch import InputError

HELD_OUT = 20                   # every 20th image is evaluated where there is no val/; our choice
EXTENSIONS = ", ".join(IMG_EXTENSIONS)


class Images(Dataset):
    """Image files: (PIL image, class). samples: (path, class) of each; classes: their names."""

    def __init__(self, samples, classes=("unlabelled",)):
        self.samples, self.classes = samples, list(classes)
        self.targets = [label for _, label in samples]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        path, label = self.samples[index]
        if not os.path.isfile(path):                        # a pipe would be read for ever
            raise OSError("not there, or no regular file")
        return Image.open(path), label                      # data.read() decodes it


def labelled(root, split):
    """The images of root/split, a folder for each class, in the order of torchvision's ImageFolder.

    Raises InputError where they are not there, or the classes of train/ and val/ differ.
    """
    remedy = "labels are the names of folders: DIR/train/CLASS/"
    if split == "val":
        remedy = "add one, laid out as train/, or take finetune.py --holdout 0.1, which needs none"
    folder = subfolder(root, split, remedy=remedy)
    classes = class_names(folder)
    if not classes:
        raise InputError(f"--data {folder}: no folders in it; labels are the names of folders")
    if Path(root, "train").is_dir():                        # an evaluation needs none
        refuse_other_classes(root, class_names(Path(root, "train")), classes)
    samples = []
    for label, name in enumerate(classes):
        paths = image_files(folder / name)
        if not paths:
            raise InputError(f"--data {folder / name}: no images in it ({EXTENSIONS})")
        samples += [(path, label) for path in paths]
    return Images(samples, classes)


def unlabelled(root, split):
    """The images of root/train or else root, and of root/val, in any folders there.

    Where there is no val/, every 20th image in the order of the paths is "val", and not "train".
    Raises InputError where there are none.
    """
    folder = subfolder(root, remedy="pass a folder of images")
    val = folder / "val"
    if split == "val" and val.is_dir():
        folder = val
    elif (folder / "train").is_dir():
        folder = folder / "train"
    paths = image_files(folder, leave_out=val)
    prefix = len(os.path.join(folder, ""))
    paths.sort(key=lambda path: path[prefix:].partition(os.sep)[0])     # labelled's order
    if not val.is_dir():
        held_out = paths[::HELD_OUT]
        del paths[::HELD_OUT]
        if split == "val":
            paths = held_out
    if not paths:
        raise InputError(f"--data {folder}: no images for {split} in it ({EXTENSIONS})")
    return Images([(path, 0) for path in paths])


def subfolder(root, *parts, remedy="see the README for the layout"):
    """The folder root/parts of --data. Raises InputError, with the remedy, where it is missing."""
    folder = Path(root, *parts)
    if not folder.is_dir():
        there = Path(root).is_dir()
        why = f"it has no {'/'.join(parts)}/ folder" if there else "no such folder"
        raise InputError(f"--data {root}: {why}; {remedy}")
    return folder


def class_names(folder):
    _, names, _ = next(walk(folder))
    return sorted(name for name in names if not name.startswith("."))


def refuse_other_classes(root, train, val):
    differences = []
    for split, own, others in (("train", train, val), ("val", val, train)):
        only = sorted(set(own) - set(others))
        if only:
            more = f" and {len(only) - 3} more" if len(only) > 3 else ""
            differences.append(f"in {split}/ only: {', '.join(only[:3])}{more}")
    if differences:
        raise InputError(
            f"--data {root}: train/ and val/ have different classes ({'; '.join(differences)})")


def image_files(folder, leave_out=None):
    """Paths of the images in a folder at any depth, by the names of their folders, then their own.

    leave_out: a folder whose images do not count, under whatever name.
    """
    entered = {os.path.realpath(folder)}
    if leave_out:
        entered.add(os.path.realpath(leave_out))
    found = []
    for parent, names, files in walk(folder):
        to_enter = []
        for name in sorted(names):
            place = os.path.realpath(os.path.join(parent, name))
            if place not in entered and not name.startswith("."):
                entered.add(place)
                to_enter.append(name)
        names[:] = to_enter                                 # os.walk enters what is left
        for name in files:
            if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith("."):
                found.append((parent, name))
    return [os.path.join(parent, name) for parent, name in sorted(found)]


def walk(folder):
    def refuse(error):
        raise InputError(f"{error.filename}: not readable ({error.strerror})") from error

    return os.walk(folder, followlinks=True, onerror=refuse)
