"""How long convolutions and matrix products take: the engine and PyTorch, layer by layer of the benchmark networks.

python benchmarks/conv.py [--networks resnet18,lenet] [--layers conv1] [--precision bf16] [--threads 2] [--exact]
                          [--quick] [--json]

`peak` is the fraction of the multiply-adds that the core could do in that time, measured in the same run. Winograd's
convolution needs fewer of them, so that it may be above 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

import numpy as np
from common import FmaPeak, interleave, print_json, set_threads, timed
from networks import CASES, FORMATS

from hpctrain.backends.native import Native
from hpctrain.layers import Conv, Dense
from hpctrain.precision import BF16

PASSES = ("forward", "dx", "dw")
MEASURABLE = 0.002
"""Seconds that a step is repeated for at least, as clocks cost some microseconds."""
ERROR = {"float32": 1e-4, "bf16": 2e-2}
"""Largest |ours - theirs| / |theirs| of a result, by precision."""


@dataclass(frozen=True)
class Layer:
    """A convolution of x (N, *inputs, C), or with an empty kernel a dense layer."""

    network: str
    name: str
    shape: tuple[int, ...]
    filters: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    count: int = 1
    """How often the network has such a layer."""

    def __str__(self) -> str:
        spatial = "x".join(map(str, self.shape[1:-1]))
        kernel = "x".join(map(str, self.kernel))
        return f"{self.shape[0]}x{spatial or 1} {self.shape[-1]}->{self.filters} {kernel or 'dense'}" + (
            f" /{self.stride[0]}" if max(self.stride, default=1) > 1 else ""
        )

    @property
    def outputs(self) -> tuple[int, ...]:
        sizes = zip(self.shape[1:-1], self.kernel, self.stride, self.padding, strict=True)
        return tuple((n + 2 * p - k) // s + 1 for n, k, s, p in sizes)

    @property
    def operations(self) -> int:
        """Of one pass, multiplications and additions."""
        return 2 * self.shape[0] * prod(self.outputs) * prod(self.kernel) * self.shape[-1] * self.filters


def layers(network: str, quick: bool) -> list[Layer]:
    """The different convolutions and dense layers of a network."""
    case, different = CASES[network], dict[str, Layer]()
    for node in case.build(max(1, case.batch // (8 if quick else 1))).nodes.values():
        layer = node.layer
        if not isinstance(layer, Conv | Dense):
            continue
        shape = node.input_shapes[0]
        dims = len(shape) - 2
        if isinstance(layer, Conv):
            stride, padding = (tuple(np.broadcast_to(value, dims).tolist()) for value in (layer.stride, layer.padding))
            kernel = tuple(np.broadcast_to(layer.kernel, dims).tolist())
            found = Layer(network, node.name, shape, layer.filters, kernel, stride, padding)
        else:
            found = Layer(network, node.name, shape, layer.units, ())
        before = different.setdefault(str(found), replace(found, count=0))
        different[str(found)] = replace(before, count=before.count + 1)
    return list(different.values())


class Work(NamedTuple):
    """One pass of one side: what computes it, and the result, channels last."""

    step: Callable[[], None]
    result: Callable[[], np.ndarray]


def arrays(layer: Layer, precision: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, w and dy of order 1."""
    rng = np.random.default_rng(1)
    shapes = (
        layer.shape,
        (*layer.kernel, layer.shape[-1], layer.filters),
        (layer.shape[0], *layer.outputs, layer.filters),
    )
    dtype = BF16 if precision == "bf16" else np.float32
    x, w, dy = (rng.standard_normal(shape, np.float32).astype(dtype) for shape in shapes)
    return x, w, dy


def ours(layer: Layer, exact: bool, precision: str) -> dict[str, Work]:
    """The engine's passes; x and dx have their padding around them, as the executor hands them over."""
    native = Native(exact)
    x, w, dy = arrays(layer, precision)
    y, dw = np.empty_like(dy), np.empty(w.shape, np.float32)
    padded = np.pad(x, [(0, 0), *((p, p) for p in layer.padding), (0, 0)])
    dx = np.empty_like(padded)
    inner = (slice(None), *(slice(p, p + n) for p, n in zip(layer.padding, layer.shape[1:-1], strict=True)))
    if not layer.kernel:
        return {
            "forward": Work(lambda: native.gemm(x, w, y), lambda: y),
            "dx": Work(lambda: native.gemm(dy, w, dx, transpose_b=True), lambda: dx),
            "dw": Work(lambda: native.gemm(x, dy, dw, transpose_a=True), lambda: dw),
        }
    ones = (1,) * len(layer.kernel)
    return {
        "forward": Work(lambda: native.conv(padded, w, y, layer.stride, ones), lambda: y),
        "dx": Work(lambda: native.conv_dx(dy, w, dx, layer.stride, ones), lambda: dx[inner]),
        "dw": Work(lambda: native.conv_dw(padded, dy, dw, layer.stride, ones), lambda: dw),
    }


def torchs(layer: Layer, channels_last: bool, precision: str) -> dict[str, Work]:
    """PyTorch's passes, in one of its two formats."""
    import torch

    dims = len(layer.kernel)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    x, w, dy = (a.astype(np.float32) for a in arrays(layer, precision))
    found: dict[str, Any] = {}

    def tensor(a: np.ndarray) -> Any:
        return torch.from_numpy(np.ascontiguousarray(a)).to(dtype)

    def work(name: str, compute: Callable[[], Any], to_numpy: Callable[[Any], np.ndarray]) -> Work:
        return Work(lambda: found.__setitem__(name, compute()), lambda: to_numpy(found[name].float()))

    if not layer.kernel:
        tx, tw, tdy = tensor(x), tensor(w.T), tensor(dy)
        return {
            "forward": work("forward", lambda: torch.nn.functional.linear(tx, tw), lambda t: t.numpy()),
            "dx": work("dx", lambda: tdy @ tw, lambda t: t.numpy()),
            "dw": work("dw", lambda: tdy.T @ tx, lambda t: t.numpy().T),
        }
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(dims + 2)
    memory_format = last if channels_last and last else torch.contiguous_format
    tx, tdy = (tensor(np.moveaxis(a, -1, 1)).contiguous(memory_format=memory_format) for a in (x, dy))
    tw = tensor(np.moveaxis(w, (-1, -2), (0, 1))).contiguous(memory_format=memory_format)
    convolve = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)[dims - 1]

    def gradients(mask: list[bool]) -> Any:
        rest = None, layer.stride, layer.padding, (1,) * dims, False, (0,) * dims, 1
        return torch.ops.aten.convolution_backward(tdy, tx, tw, *rest, mask)

    return {
        "forward": work(
            "forward",
            lambda: convolve(tx, tw, None, layer.stride, layer.padding),
            lambda t: np.moveaxis(t.numpy(), 1, -1),
        ),
        "dx": work("dx", lambda: gradients([True, False, False])[0], lambda t: np.moveaxis(t.numpy(), 1, -1)),
        "dw": work(
            "dw", lambda: gradients([False, True, False])[1], lambda t: np.moveaxis(t.numpy(), (0, 1), (-1, -2))
        ),
    }


def measure(layer: Layer, asked: argparse.Namespace, peak: FmaPeak) -> Iterator[dict[str, Any]]:
    """A record per pass. Raises SystemExit where the sides differ by more than rounding."""
    formats = FORMATS if asked.precision == "float32" and layer.kernel else FORMATS[-1:]
    sides = {name: torchs(layer, name == "channels_last", asked.precision) for name in formats}
    sides["hpctrain"] = ours(layer, asked.exact, asked.precision)
    for which in PASSES:
        works = {name: side[which] for name, side in sides.items()}
        for work in works.values():
            work.step()  # allocates
        slowest = max(timed(work.step, 1).wall for work in works.values())
        times = max(1, int(MEASURABLE / slowest))
        rounds = 1 if asked.quick else max(asked.rounds, int(asked.seconds / (slowest * times * len(works))))
        steps = {name: lambda work=work, times=times: timed(work.step, times) for name, work in works.items()}
        medians = interleave(steps, rounds)
        spent = {name: (s.cpu if asked.threads == 1 else s.wall) for name, s in medians.items()}
        want, got = (works[name].result().astype(float) for name in (formats[0], "hpctrain"))
        if (error := float(np.abs(got - want).max() / np.abs(want).max())) > ERROR[asked.precision]:
            raise SystemExit(f"{layer.network} {layer.name} {which}: differs from PyTorch by {error:.2g}")
        peers = {name: s for name, s in spent.items() if name != "hpctrain"}
        best = min(peers, key=peers.__getitem__)
        yield {
            "network": layer.network, "layer": layer.name, "algorithm": which, "shape": str(layer),
            "count": layer.count,
            "threads": asked.threads, "precision": asked.precision,
            "seconds": spent["hpctrain"], "peer": f"torch {best}",
            "peer_seconds": peers[best], "ratio": peers[best] / spent["hpctrain"], "error": error,
            "peak": layer.operations / spent["hpctrain"] / peak.measure() / asked.threads,
        }  # fmt: skip


def arguments() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(CASES), help="some of %(default)s")
    parser.add_argument("--layers", default="", help="only those whose name has this in it")
    parser.add_argument("--threads", type=int, default=1, help="of each side (default: 1)")
    parser.add_argument("--precision", choices=ERROR, default="float32", help="bf16: PyTorch in channels_last")
    parser.add_argument("--rounds", type=int, default=7, help="at least this many of each side (default: 7)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each pass of each layer, about (default: 2)")
    parser.add_argument("--exact", action="store_true", help="without Winograd's convolution")
    parser.add_argument("--quick", action="store_true", help="an eighth of the batch, one round: to see that it runs")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    asked = parser.parse_args()
    asked.networks = asked.networks.split(",")
    if unknown := set(asked.networks) - CASES.keys():
        parser.error(f"--networks {','.join(unknown)}: choose among {','.join(CASES)}")
    return asked


def main() -> None:
    """Measure the layers that are asked for, and print."""
    asked = arguments()
    set_threads(asked.threads)
    import torch

    torch.set_num_threads(asked.threads)
    peak, records = FmaPeak(), []
    clock = "CPU time" if asked.threads == 1 else "wall time"
    print(
        f"milliseconds ({clock}, medians), {asked.threads} threads, {asked.precision}; torch: the better of its formats"
    )
    print(f"{'network':<10}{'layer':<24}{'shape':<32}{'pass':<9}{'torch':>9}{'hpctrain':>9}{'ratio':>7}{'peak':>7}")
    for network in asked.networks:
        theirs = mine = 0.0
        for place, layer in enumerate(layers(network, asked.quick)):
            if asked.layers not in layer.name:
                continue
            for record in measure(layer, asked, peak):
                records.append(record)
                if place or record["algorithm"] != "dx":  # nobody needs the gradient by the images
                    theirs += layer.count * record["peer_seconds"]
                    mine += layer.count * record["seconds"]
                print(
                    f"{network:<10}{layer.name:<24}{layer!s:<32}{record['algorithm']:<9}"
                    f"{record['peer_seconds'] * 1e3:>9.3f}{record['seconds'] * 1e3:>9.3f}"
                    f"{record['ratio']:>7.2f}{record['peak']:>7.2f}",
                    flush=True,
                )
        if mine:
            both = f"{theirs * 1e3:>9.1f}{mine * 1e3:>9.1f}{theirs / mine:>7.2f}"
            print(f"{network:<10}{'all in a step, each as often as it occurs':<65}{both}")
    print(f"FMA peak of a core: {peak.measure() / 1e9:.1f} GFLOP/s")
    if asked.json:
        print_json("benchmarks/conv.py", records, fma_peak=peak.measure())


if __name__ == "__main__":
    main()
