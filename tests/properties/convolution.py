"""Convolutions and transposed convolutions in 1, 2 and 3 dimensions, options drawn, images and frames."""

from __future__ import annotations

from properties.program import Program, Value, operation


def _divisors(*sizes: int) -> list[int]:
    return [n for n in range(1, min(sizes) + 1) if all(size % n == 0 for size in sizes)]


def _length(size: int, taps: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1


def _options(o: Program, v: Value) -> tuple[str, tuple[int, ...]] | None:
    """Arguments after the channels, and the sizes that come out; the channels' number is drawn here."""
    dims = v.rank - 1
    out = o.pick((o.size(), v.shape[0], 2 * v.shape[0]))
    taps, stride = o.pick((1, 2, 3)), o.pick((1, 1, 2))
    padding, dilation = o.pick((0, 1, 2)), o.pick((1, 1, 2))
    groups = o.pick(_divisors(v.shape[0], out))
    sizes = tuple(_length(size, taps, stride, padding, dilation) for size in v.shape[1:])
    mode = o.mode("zeros", "zeros", "zeros", "reflect", "circular", "same")
    if mode == "same":
        stride, padding, sizes = 1, 0, v.shape[1:]
    limit = min(v.shape[1:])
    if min(sizes) < 1 or (mode in ("reflect", "circular") and padding >= limit):
        return None
    text = f"{v.shape[0]}, {out}, {taps}, stride={stride}, dilation={dilation}, groups={groups}"
    text += ", padding='same'" if mode == "same" else f", padding={padding}"
    text += f", padding_mode='{mode}'" if mode in ("reflect", "circular") and (dims < 3 or mode == "circular") else ""
    return f"nn.Conv{dims}d({text}{o.maybe(', bias=False', 4)})", (out, *sizes)


@operation(ranks=(2, 3, 4))
def convolution(o: Program, v: Value) -> Value | None:
    options = _options(o, v)
    if options is None:
        return None
    code, shape = options
    channels_last = o.maybe(".contiguous(memory_format=torch.channels_last)", 3) if v.rank == 3 else ""
    return o.value(f"{o.module(code)}({v}{channels_last})", shape, fresh=True)


@operation(ranks=(3, 4))
def convolution_of_frames(o: Program, v: Value) -> Value | None:
    frame = Value(v.name, v.shape[1:])
    options = _options(o, frame)
    if options is None:
        return None
    code, shape = options
    rows = o.relayout(v, o.mode("major", "minor"))
    return o.value(f"{o.module(code)}({rows})", (v.shape[0], *shape), rows.layout)


@operation(ranks=(2, 3))
def functional_convolution(o: Program, v: Value) -> Value:
    dims, out = v.rank - 1, o.size()
    weight, bias = o.parameter(out, v.shape[0], *[1] * dims), o.fill(o.maybe(", <n>"), n=out)
    return o.value(f"F.conv{dims}d({v}, {weight}{bias})", (out, *v.shape[1:]), fresh=True)


@operation(ranks=(1,))
def filter_of_a_vector(o: Program, v: Value) -> Value:
    weight = o.parameter(1, 1, 3)
    return o.value(f"F.conv1d({v}.unsqueeze(1), {weight}, padding=1).squeeze(1)", v.shape)


@operation(ranks=(2, 3, 4))
def transposed_convolution(o: Program, v: Value) -> Value | None:
    dims, out = v.rank - 1, o.size()
    taps, stride, groups = o.pick((1, 2, 3)), o.pick((1, 2)), o.pick(_divisors(v.shape[0], out))
    padding = o.pick((0, 1)) if taps > 1 else 0
    sizes = tuple((size - 1) * stride - 2 * padding + taps for size in v.shape[1:])
    if min(sizes) < 1:
        return None
    text = f"{v.shape[0]}, {out}, {taps}, stride={stride}, padding={padding}, groups={groups}"
    return o.value(f"{o.module(f'nn.ConvTranspose{dims}d({text})')}({v})", (out, *sizes), fresh=True)
