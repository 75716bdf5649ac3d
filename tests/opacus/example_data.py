"""Small real data in the layouts that Opacus's example scripts read from disk.

The digits of scikit-learn stand for MNIST (as IDX files) and for CIFAR-10 (as its pickled batches, in colour); lists of
surnames stand for the names by language. The scripts themselves are not touched.
"""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

SURNAMES = {
    "English": "Smith Jones Taylor Brown Williams Wilson Johnson Davies Patterson Robinson Wright Thompson Evans "
    "Walker White Roberts Green Hall Wood Jackson Clarke Harris Clark Cooper Turner Hill Moore Ward "
    "Watson Morris Harrison King Baker Bennett Parker Shaw Bailey Chapman Ellis Foster",
    "Italian": "Rossi Russo Ferrari Esposito Bianchi Romano Colombo Ricci Marino Greco Bruno Gallo Conti Costa "
    "Giordano Mancini Rizzo Lombardi Moretti Barbieri Fontana Santoro Mariani Rinaldi Caruso Ferrara "
    "Galli Martini Leone Longo Gentile Martinelli Vitale Lombardo Serra Coppola Marchetti Parisi Villa "
    "Niccolò",
    "Japanese": "Sato Suzuki Takahashi Tanaka Watanabe Ito Yamamoto Nakamura Kobayashi Kato Yoshida Yamada Sasaki "
    "Yamaguchi Matsumoto Inoue Kimura Hayashi Shimizu Yamazaki Mori Abe Ikeda Hashimoto Ishikawa Nakajima "
    "Maeda Fujita Ogawa Goto Okada Hasegawa Murakami Kondo Ishii Saito Sakamoto Endo Aoki Fujii",
    "Polish": "Nowak Kowalski Wiśniewski Wójcik Kowalczyk Kamiński Lewandowski Zieliński Szymański Woźniak "
    "Dąbrowski Kozłowski Jankowski Mazur Wojciechowski Kwiatkowski Krawczyk Kaczmarek Piotrowski "
    "Grabowski Zając Pawłowski Michalski Król Wieczorek Jabłoński Wróbel Nowakowski Majewski Olszewski "
    "Stępień Malinowski Jaworski Adamczyk Dudek Nowicki Pawlak Górski Witkowski Walczak",
}
"""Forty common surnames a language."""

HELD_OUT = 60
"""Examples in a test set."""


def digits(number: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The first handwritten digits of scikit-learn, enlarged from 8 x 8.

    Returns:
        Images (number, size, size) uint8 and their labels (number,) uint8.
    """
    raw = load_digits()
    images = torch.as_tensor(raw.images[:number] * (255 / 16))[:, None]
    enlarged = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    return enlarged[:, 0].round().byte().numpy(), raw.target[:number].astype(np.uint8)


def write_mnist(root: Path, examples: int) -> None:
    """`MNIST/raw` with a training set of so many examples, which torchvision takes for a finished download."""
    images, labels = digits(examples + HELD_OUT, 28)
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part, rows in (("train", slice(None, examples)), ("t10k", slice(examples, None))):
        _write_idx(folder / f"{part}-images-idx3-ubyte", images[rows])
        _write_idx(folder / f"{part}-labels-idx1-ubyte", labels[rows])


def _write_idx(path: Path, array: np.ndarray) -> None:
    """Bytes in the IDX format: a magic number, the shape in big-endian 32 bits, the entries."""
    unsigned_byte = 8
    header = bytes([0, 0, unsigned_byte, array.ndim]) + np.array(array.shape, dtype=">i4").tobytes()
    path.write_bytes(header + array.tobytes())


def write_cifar10(root: Path, examples: int) -> dict[str, str]:
    """`cifar-10-batches-py` with five training batches of so many examples in all; digits, each in a colour of its own.

    Returns:
        MD5 sum of each file, by name. They are not CIFAR-10's, so torchvision has to be told.
    """
    grey, labels = digits(examples + HELD_OUT, 32)
    colours = 128 + np.random.default_rng(0).integers(128, size=(len(grey), 3, 1, 1))
    rows = (grey[:, None] * colours // 255).astype(np.uint8).reshape(len(grey), -1)
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    contents: dict[str, object] = {"batches.meta": {"label_names": [str(digit) for digit in range(10)]}}
    for batch in range(5):
        part = slice(batch, examples, 5)
        contents[f"data_batch_{batch + 1}"] = {
            "data": rows[:examples][part],
            "labels": labels[:examples][part].tolist(),
        }
    contents["test_batch"] = {"data": rows[examples:], "labels": labels[examples:].tolist()}
    sums = {}
    for name, content in contents.items():
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        sums[name] = hashlib.md5(data).hexdigest()
    return sums


def write_names(root: Path) -> None:
    """A file of names a language."""
    root.mkdir(parents=True)
    for language, names in SURNAMES.items():
        (root / f"{language}.txt").write_text("\n".join(names.split()) + "\n", encoding="utf-8")
