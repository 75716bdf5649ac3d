"""jax-privacy's step and plain JAX's, on the DiT of models.py written in JAX. A script: it runs in its own environment.

    python jax_step.py '{"task": "times", "width": 384, "depth": 4, "tokens": 256, "batch": 8, "microbatches": 8,
                         "pairs": 7, "warm_up": 2, "threads": 2}'
    python jax_step.py '{"task": "peak", "contender": "jax_privacy", ...}'

Prints JSON, a cell for each contender. Both steps are compiled, take the logical batch in micro-batches, and use
optax's AdamW. It knows nothing of dither or torch, which the environment need not have.
Source: jax-privacy 2.0, `clipping.clipped_grad` and `noise_addition.gaussian_privatizer`.

Legend: B examples, T tokens, D width, H heads.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import sys
import time
from collections.abc import Callable
from typing import Any

SIDE, CHANNELS, CLASSES, FREQUENCIES = 2, 4, 1000, 256


def parameters(width: int, depth: int) -> dict[str, Any]:
    """Random weights, none zero."""
    import numpy as np

    numbers = np.random.default_rng(0)

    def dense(inner: int, outer: int) -> dict[str, Any]:
        weight = numbers.normal(0, inner**-0.5, (inner, outer)).astype("float32")
        return {"w": weight, "b": numbers.normal(0, 0.02, outer).astype("float32")}

    blocks = [
        {
            "ada": dense(width, 6 * width),
            "qkv": dense(width, 3 * width),
            "proj": dense(width, width),
            "fc1": dense(width, 4 * width),
            "fc2": dense(4 * width, width),
        }
        for _ in range(depth)
    ]
    patch = SIDE * SIDE * CHANNELS
    return {
        "embed": dense(patch, width),
        "time": [dense(FREQUENCIES, width), dense(width, width)],
        "label": numbers.normal(0, 0.02, (CLASSES, width)).astype("float32"),
        "blocks": blocks,
        "ada": dense(width, 2 * width),
        "out": dense(width, patch),
    }


def losses_of(heads: int) -> Callable[..., Any]:
    """The DiT's loss of each example: patches (B, T, 16), timesteps (B,), labels (B,), noise (B, T, 16) to (B,)."""
    import jax
    import jax.numpy as jnp

    def dense(layer: dict[str, Any], x: Any) -> Any:
        return x @ layer["w"] + layer["b"]

    def modulated(x: Any, shift: Any, scale: Any) -> Any:
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)
        return x * (1 + scale[:, None]) + shift[:, None]

    def attention(block: dict[str, Any], x: Any) -> Any:
        q, k, v = jnp.split(dense(block["qkv"], x), 3, axis=-1)
        q, k, v = (part.reshape(*part.shape[:-1], heads, -1) for part in (q, k, v))
        return dense(block["proj"], jax.nn.dot_product_attention(q, k, v).reshape(x.shape))

    def losses(p: dict[str, Any], patches: Any, t: Any, y: Any, noise: Any) -> Any:
        width = p["label"].shape[1]
        angles = t[:, None] * jnp.exp(-math.log(10000.0) * jnp.arange(FREQUENCIES // 2) / (FREQUENCIES // 2))
        waves = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], 1)
        c = dense(p["time"][1], jax.nn.silu(dense(p["time"][0], waves))) + p["label"][y]
        places = jnp.arange(patches.shape[1])[:, None] * 10000.0 ** (-jnp.arange(width // 2) / (width // 2))
        x = dense(p["embed"], patches) + jnp.concatenate([jnp.sin(places), jnp.cos(places)], 1)
        for block in p["blocks"]:
            shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = jnp.split(dense(block["ada"], jax.nn.silu(c)), 6, 1)
            x = x + gate_1[:, None] * attention(block, modulated(x, shift_1, scale_1))
            inner = jax.nn.gelu(dense(block["fc1"], modulated(x, shift_2, scale_2)))
            x = x + gate_2[:, None] * dense(block["fc2"], inner)
        shift, scale = jnp.split(dense(p["ada"], jax.nn.silu(c)), 2, 1)
        return jnp.square(dense(p["out"], modulated(x, shift, scale)) - noise).mean((1, 2))

    return losses


def draw(tokens: int, rows: int) -> tuple[Any, ...]:
    """The logical batch."""
    import jax
    import numpy as np

    numbers = np.random.default_rng(1)
    patch = SIDE * SIDE * CHANNELS
    patches, noise = (numbers.normal(size=(rows, tokens, patch)).astype("float32") for _ in range(2))
    t, y = numbers.integers(1000, size=rows), numbers.integers(CLASSES, size=rows)
    placed: tuple[Any, ...] = jax.device_put((patches, t.astype("float32"), y.astype("int32"), noise))
    return placed


def gradient_of(asked: dict[str, Any], private: bool, max_grad_norm: float = 1.0) -> Callable[..., Any]:
    """The mean gradient of the logical batch, or its clipped sum, by parameters and data."""
    import jax
    import jax.numpy as jnp

    losses, batch = losses_of(max(1, asked["width"] // 64)), asked["batch"]
    if private:
        from jax_privacy import clipping

        clipped: Callable[..., Any] = clipping.clipped_grad(
            lambda p, *example: losses(p, *example)[0],
            l2_clip_norm=max_grad_norm,
            batch_argnums=(1, 2, 3, 4),
            microbatch_size=batch,
        )
        return clipped

    def plain(p: Any, *data: Any) -> Any:
        parts = jax.tree.map(lambda a: a.reshape(-1, batch, *a.shape[1:]), data)
        one = jax.grad(lambda p, part: losses(p, *part).mean() / asked["microbatches"])

        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, one(p, part)), None

        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, p), parts)[0]

    return plain


def build(asked: dict[str, Any], private: bool) -> Callable[[], None]:
    """One step of training, compiled; it waits for its result."""
    import jax
    import optax

    rows = asked["microbatches"] * asked["batch"]
    gradient, data = gradient_of(asked, private), draw(asked["tokens"], rows)
    if private:
        from jax_privacy import noise_addition

        noise = noise_addition.gaussian_privatizer(stddev=1.0, prng_key=jax.random.key(secrets.randbits(31)))
        update = optax.chain(noise, optax.scale(1 / rows), optax.adamw(1e-4))
    else:
        update = optax.adamw(1e-4)
    weights = jax.device_put(parameters(asked["width"], asked["depth"]))
    state = [weights, update.init(weights)]

    @jax.jit
    def advance(weights: Any, kept: Any, *data: Any) -> tuple[Any, Any]:
        changes, kept = update.update(gradient(weights, *data), kept, weights)
        return optax.apply_updates(weights, changes), kept

    def step() -> None:
        state[:] = jax.block_until_ready(advance(*state, *data))

    return step


def timed(step: Callable[[], None]) -> float:
    """Seconds of a step."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def times(asked: dict[str, Any]) -> dict[str, Any]:
    """Both in turns; the first step compiles."""
    running = {"jax_plain": build(asked, False), "jax_privacy": build(asked, True)}
    cells: dict[str, Any] = {name: {"seconds": [], "first_seconds": timed(step)} for name, step in running.items()}
    for step in running.values():
        for _ in range(asked["warm_up"] - 1):
            step()
    for number in range(asked["pairs"]):
        for name in list(running)[:: -1 if number % 2 else 1]:
            cells[name]["seconds"].append(timed(running[name]))
    return cells


def peak(asked: dict[str, Any]) -> dict[str, Any]:
    """High water of resident memory above what was resident before the step was built; compiled code counts."""
    import jax

    small = {**asked, "width": 64, "depth": 1, "tokens": 4, "batch": 2, "microbatches": 1}
    private = asked["contender"] == "jax_privacy"
    build(small, private)()  # loads the code that a step runs
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(parameters(asked["width"], asked["depth"])))
    before = _status("VmRSS") + weights  # which are not counted for torch either
    peaks = []
    step = build(asked, private)
    for _ in range(3):
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        step()
        peaks.append(_status("VmHWM") / 2**20)
    above = [peak - before / 2**20 for peak in peaks]
    return {asked["contender"]: {"peak_mib": above[-1], "first_peak_mib": above[0], "process_mib": peaks[-1]}}


def check(asked: dict[str, Any]) -> dict[str, Any]:
    """Relative distance of the private sum without clipping, over the batch size, from the plain gradient."""
    import jax
    import jax.numpy as jnp

    rows = asked["microbatches"] * asked["batch"]
    weights, data = jax.device_put(parameters(asked["width"], asked["depth"])), draw(asked["tokens"], rows)
    plain = jax.tree.leaves(gradient_of(asked, False)(weights, *data))
    sums = jax.tree.leaves(gradient_of(asked, True, float("inf"))(weights, *data))
    wrong = sum(float(jnp.square(a / rows - b).sum()) for a, b in zip(sums, plain, strict=True))
    return {"distance": math.sqrt(wrong / sum(float(jnp.square(b).sum()) for b in plain))}


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name + ":")) * 2**10


def versions() -> dict[str, str]:
    """Of what is measured here."""
    from importlib.metadata import version

    return {name: version(name) for name in ("jax", "jax-privacy", "optax")}


TASKS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"times": times, "peak": peak, "check": check}


def main() -> None:
    """Do what the first argument asks."""
    asked = json.loads(sys.argv[1])
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if asked.get("threads"):  # XLA takes as many threads as it may run on CPUs
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: asked["threads"]])
    print(json.dumps({"cells": TASKS[asked["task"]](asked), "versions": versions()}))


if __name__ == "__main__":
    main()
