"""Compile every kernel of dither.kernels for every entry of its table, without a GPU: registers, shared memory, spills.

    python benchmarks/kernels_aot.py                # a table
    python benchmarks/kernels_aot.py --json         # the same, a line of JSON each
    python benchmarks/kernels_aot.py --only linear

Nothing runs, so nothing here is a speed. "aligned" is what a launch compiles when sizes and strides are multiples of
16, "any" when they are not; "linear large" is for aligned ones only. Registers a thread and spilled bytes a thread are
read from the binary (cuobjdump), bytes of shared memory are Triton's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter's kernels cannot be compiled

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dither.kernels import convolution, linear, reduction, rows
from dither.kernels.tiles import TABLE, Tiles

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
CUOBJDUMP = str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
SHARED = {80: 99 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that a program may take on every GPU that uses the entry."""


def variants(shape: str, tiles: Tiles) -> list[tuple[str, object, dict, dict, set[str]]]:
    """(name, kernel, constants, dtypes by argument, arguments that are always 32-bit numbers) of a table entry."""
    if shape.startswith("linear"):
        blocks = {"BLOCK_T": tiles.rows, "BLOCK_P": tiles.p, "BLOCK_D": tiles.d, "WIDEN": False}
        contiguous = {"x_d": 1, "g_p": 1, **blocks}
        return [
            (shape, linear.linear_tiles, {**contiguous, "parts": 1, "PARTIAL": False}),
            (f"{shape} split", linear.linear_tiles, {**contiguous, "PARTIAL": True}),
        ]
    if shape.startswith("convolution"):
        blocks = {"BLOCK_R": tiles.rows, "BLOCK_P": tiles.p, "BLOCK_Q": tiles.d, "WIDEN": False}
        one = dict.fromkeys(("x_w", "g_w", "stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w"), 1)
        strided = {"x_w": 1, "g_w": 1}
        return [
            (
                f"{shape} {kh}x{kw}{' split' if partial else ''}",
                convolution.convolution_tiles,
                {"KH": kh, "KW": kw, **blocks, **constants, "PARTIAL": partial, **({} if partial else {"parts": 1})},
            )
            for kh, kw, constants, partial in ((3, 3, one, False), (3, 3, one, True), (4, 4, strided, False))
        ]
    if shape == "weighted sum":
        constants = {"BLOCK_B": tiles.rows, "BLOCK_P": tiles.d}
        return [
            (f"{shape}{' masked' if masked else ''}", rows.weighted_sum, {**constants, "MASKED": masked})
            for masked in (False, True)
        ]
    return [(shape, rows.row_squares, {"BLOCK": tiles.d})]


POINTERS = {"x": None, "g": None, "held": None, "into": None, "weights": "fp32", "out": "fp32", "partial": "fp32"}
"""Arguments that are pointers, and their dtype where it is always the same."""

COUNTS = {"B", "T", "R", "parts", "tiles", "tiles_p", "tiles_d", "tiles_q", "chunks", "blocks"}
"""Arguments that are multiples of 16 by chance only."""


def signature(kernel, constants: dict, dtype: str, masked: bool) -> dict[str, str]:
    pointers = {**POINTERS, "kept": "i8" if masked else "fp32"}
    found = {}
    for name in kernel.arg_names:
        if name in constants:
            found[name] = "constexpr"
        else:
            found[name] = "*" + (pointers[name] or dtype) if name in pointers else "i32"
    return found


def compiled(kernel, constants: dict, dtype: str, sm: int, tiles: Tiles, aligned: bool) -> dict:
    """Registers, spilled bytes, shared bytes and bytes of cubin."""
    types = signature(kernel, constants, dtype, bool(constants.get("MASKED")))
    hinted = [n for n, t in types.items() if t[0] == "*" or (aligned and t == "i32" and n not in COUNTS)]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in hinted}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    binary = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    cubin = binary.asm["cubin"]
    return {**resources(cubin), "shared": binary.metadata.shared, "cubin": len(cubin)}


def resources(cubin: bytes) -> dict:
    """Registers a thread, and bytes of stack a thread: the kernels have no arrays of their own, so these are spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", said).groups()
    return {"registers": int(registers), "spills": int(stack)}


def entries():
    """(shape class, name, kernel, constants, dtype, generation, tiles) of everything that is compiled."""
    for (sm, dtype, shape), tiles in TABLE.items():
        for name, kernel, constants in variants(shape, tiles):
            yield shape, name, kernel, constants, NAMES[dtype], sm, tiles
    for sm in (80, 90):
        constants = {"SIZE": 4096, "CHUNK": reduction.CHUNK}
        yield (
            "add and square",
            "add and square",
            reduction.add_and_square,
            constants,
            "fp32",
            sm,
            Tiles(1, 1, reduction.CHUNK, 4, 3),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", default="", help="kernels with this in their name")
    parser.add_argument("--dtype", choices=NAMES.values(), help="bf16, fp16 or fp32 only")
    options = parser.parse_args()
    if not options.json:
        print(f"Triton {triton.__version__}; compiled, not run\n")
        print(f"{'kernel':26} {'dtype':5} {'sm':>3} {'sizes':7} {'registers':>9} {'shared':>7} {'spills':>6}")
    for shape, name, kernel, constants, dtype, sm, tiles in entries():
        if options.only not in name or options.dtype not in (None, dtype):
            continue
        for aligned in (True,) if shape == "linear large" and dtype != "fp32" else (True, False):
            found = compiled(kernel, constants, dtype, sm, tiles, aligned)
            found = {"kernel": name, "dtype": dtype, "sm": sm, "sizes": "aligned" if aligned else "any", **found}
            if options.json:
                print(json.dumps({**found, "class": shape, "allowed": SHARED[sm]}), flush=True)
            else:
                print(
                    f"{name:26} {dtype:5} {sm:3} {found['sizes']:7} {found['registers']:9} {found['shared']:7} "
                    f"{found['spills']:6}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
