"""The command line: one function per command, which imports what it needs itself, so that `--help` is instant."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpctrain import plan_arguments
from hpctrain.request import RunRequest, grid_override, require_ranks

if TYPE_CHECKING:
    from hpctrain.comm.world import World

STATUSES = (
    "exit status: 0 good, 1 verify found a difference, 2 bad input, 3 lost a rank, or waited too long for one (where "
    "hpctrain can still say so; mpirun itself gives 128 + signal), 70 a bug: please report, 75 stopped on purpose and "
    "resumable"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. `argv` defaults to the process's own arguments."""
    args, rest = parser().parse_known_args(argv)
    # argparse takes positional arguments only in one piece: those after an option are left over.
    if flags := [word for word in rest if word.startswith("-") or not hasattr(args, "words")]:
        args.parser.error(f"unrecognized arguments: {' '.join(flags)}")
    if rest:
        args.words += rest
    try:
        status: int = args.run(args)
        sys.stdout.flush()  # here, where a closed pipe can be handled
    except BrokenPipeError:  # `hpctrain data inspect FOLDER | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        from hpctrain.comm.launchers import refuse

        return refuse(error)
    return status


# --- commands --------------------------------------------------------------------------------------------------------


def demo(args: argparse.Namespace) -> int:
    """`hpctrain demo`: make data, write a config, train on several ranks of this machine."""
    from hpctrain import demo as demos

    folder = args.folder or Path("runs", args.what)
    return demos.run(args.what, folder, args.ranks, args.epochs, args.quick)


def train(args: argparse.Namespace) -> int:
    """`hpctrain train`, on every rank that a launcher started."""
    from hpctrain import launch

    request = RunRequest(args)
    if args.dry_run:
        from hpctrain import dryrun

        return dryrun.run(request.load(), request.words, args.plan_out, args.json)
    if args.plan_out:
        args.parser.error("--plan-out needs --dry-run; a run writes its plan into its folder")
    if not launch.under_launcher():
        require_ranks(request.load(), 1)

    from hpctrain.comm.signals import STOP

    STOP.install()  # now, as loading MPI takes a while, and a job may be told to stop at any time
    from hpctrain.comm.world import all_ranks, run_spmd

    def on_each_rank(world: World) -> int:
        from hpctrain import trainer

        with all_ranks(world.comm):
            config = request.load()
            require_ranks(config, world.size)
        return trainer.run(world, config, request.resume(config), args.json)

    return run_spmd(on_each_rank)


def verify(args: argparse.Namespace) -> int:
    """`hpctrain verify`, on every rank that a launcher started."""
    from hpctrain import launch

    request = RunRequest(args)
    request.overrides += [f"train.precision={args.precision}", f"train.backend={args.backend}"]
    if args.plan:
        request.overrides.append(f"plan.grid={json.dumps(args.plan)}")
    if args.grid is not None:
        request.overrides.append(grid_override(args.grid))
    if not launch.under_launcher():
        require_ranks(request.load(), 1)
    from hpctrain.comm.world import all_ranks, run_spmd

    def on_each_rank(world: World) -> int:
        from hpctrain import verify as verification

        with all_ranks(world.comm):
            config = request.load()
            require_ranks(config, world.size)
        budget = args.budget * 2**20
        options = verification.Options(args.steps, args.sample_layers, budget, args.all, args.json)
        return verification.run(world, config, options)

    return run_spmd(on_each_rank)


def plan(args: argparse.Namespace) -> int:
    """`hpctrain plan`: how to cut each layer, over how many ranks, and what that will take. Without MPI."""
    request, options = RunRequest(args), plan_arguments.Options.of(args)
    from hpctrain import plan_command

    return plan_command.run(request, options)


def data_make(args: argparse.Namespace) -> int:
    """`hpctrain data make`: write one of the data sets that can be made without a download."""
    if args.what == "digits":
        from hpctrain.data.make.digits import make_digits

        made = make_digits(args.folder, args.seed, args.size or 28)
    else:
        from hpctrain.data.make.volumes import make_volumes

        made = make_volumes(args.folder, args.size or 32, args.train, args.test, args.seed)
    for part, index in zip(("train", "test"), made, strict=True):
        print(f"{args.folder / part}: {index.samples} samples")
    return 0


def data_import(args: argparse.Namespace) -> int:
    """`hpctrain data import`: NumPy files to shards."""
    from hpctrain.data.importer import import_arrays

    *sources, folder = args.paths
    if len(sources) not in (1, 2):
        args.parser.error("give X.npy Y.npy FOLDER, or XY.npz FOLDER")
    y = sources[1] if len(sources) == 2 else None
    options = {"channels": args.channels, "classes": args.classes, "ignore": args.ignore}
    index = import_arrays(sources[0], y, folder, **options, names=tuple(args.names), like=args.like)
    print(f"{folder}: {index.samples} samples in {len(index.shards)} shards")
    return 0


def data_inspect(args: argparse.Namespace) -> int:
    """`hpctrain data inspect`: what a data set holds, and what is wrong with it."""
    from hpctrain.data.dataset import inspect

    records = inspect(args.folder, args.verify)
    *shards, summary = records
    for shard in shards:
        print(f"{shard['file']}  {shard['samples']:>8} samples  {shard['bytes']:>13,} bytes  {shard['error'] or 'ok'}")
    for key, value in summary.items():
        print(f"{key:>9}  {value}")
    if args.json:
        from hpctrain.console import print_json

        print_json("data inspect", records)
    if summary["errors"]:
        print(f"hpctrain: error: {args.folder}: {summary['errors']} bad shards, see above", file=sys.stderr)
        return 2
    if not args.verify:
        print(
            f"sizes and structure are right; to read and hash every byte:\nhpctrain data inspect {args.folder} --verify"
        )
    return 0


def doctor(args: argparse.Namespace) -> int:
    """`hpctrain doctor`: whether this machine can run this program, and what to do where it cannot."""
    from hpctrain import doctor as doctors

    return doctors.run(args.mpi, args.json)


def bench_allreduce(args: argparse.Namespace) -> int:
    """`hpctrain bench allreduce`, on every rank that a launcher started."""
    from hpctrain.comm.world import run_spmd

    def on_each_rank(world: World) -> int:
        from hpctrain import bench

        return bench.run_allreduce(world, bench.Options.of(args))

    return run_spmd(on_each_rank)


def calibrate(args: argparse.Namespace) -> int:
    """`hpctrain calibrate`, on every rank that a launcher started."""
    from hpctrain.comm.world import run_spmd

    def on_each_rank(world: World) -> int:
        from hpctrain import bench
        from hpctrain.calibration import command

        return command.run(world, RunRequest(args) if args.words else None, bench.Options.of(args), args.out)

    return run_spmd(on_each_rank)


# --- arguments -------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The grammar of the command line."""
    top = argparse.ArgumentParser(
        prog="hpctrain", description="Train convolutional networks, partitioned over MPI ranks.", epilog=STATUSES
    )
    top.add_argument("--version", action=_Version, nargs=0, help="print the version and leave")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    sub = _command(commands, "demo", demo, "train a small network on 4 ranks of this machine")
    sub.add_argument("what", nargs="?", default="digits", choices=("digits", "volumes"))
    sub.add_argument("--ranks", type=_positive, default=4)
    sub.add_argument("--folder", type=Path, help="where data, config and runs go (default: runs/digits)")
    sub.add_argument("--epochs", type=_positive, help="how long to train")
    sub.add_argument("--quick", action="store_true", help="little data, one epoch: only to see that it runs")

    sub = _command(commands, "train", train, "train a network; start it with mpirun or srun")
    sub.add_argument("words", nargs="*", metavar="CONFIG.toml section.key=value", help="the config, and changes to it")
    sub.add_argument("--resume", nargs="?", const="", metavar="RUN", help="continue from a run folder's checkpoint")
    sub.add_argument("--dry-run", action="store_true", help="print the resolved config and the plan, and leave")
    sub.add_argument("--plan-out", type=Path, metavar="PLAN.json", help="with --dry-run: write the plan, to be edited")
    _json(sub)

    sub = _command(commands, "verify", verify, "check that a plan computes what one rank computes")
    sub.add_argument("words", nargs="*", metavar="CONFIG.toml section.key=value", help="the config, and changes to it")
    cut = sub.add_mutually_exclusive_group()
    cut.add_argument("--plan", metavar="PLAN.json", help="the plan to check, instead of the config's")
    cut.add_argument("--grid", metavar="batch=3,height=2", help="a grid for all layers, instead of the config's")
    sub.add_argument("--steps", type=_positive, default=2, help="training steps (default: 2)")
    sub.add_argument("--precision", choices=("float64", "float32"), default="float64", help="whatever the config says")
    sub.add_argument("--backend", choices=("reference", "native"), default="reference", help="whatever the config says")
    sub.add_argument("--sample-layers", action="store_true", help="layers one at a time, on shapes cut to fit --budget")
    sub.add_argument(
        "--budget", type=_positive, default=256, metavar="MIB", help="for one sampled layer (default: 256)"
    )
    sub.add_argument("--all", action="store_true", help="show every layer and edge of a large network")
    sub.set_defaults(resume=None)
    _json(sub)

    sub = _command(commands, "plan", plan, "find how to cut each layer, over how many ranks, and what it will take")
    plan_arguments.add(sub)
    sub.set_defaults(resume=None)
    _json(sub)

    data = _command(commands, "data", None, "make, import and inspect data sets")
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    sub = _command(actions, "make", data_make, "write a data set that needs no download")
    sub.add_argument("what", choices=("digits", "volumes"))
    sub.add_argument("folder", type=Path)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--size", type=_positive, help="extent of a sample along each dim (28, or 32 for volumes)")
    sub.add_argument("--train", type=_positive, default=512, help="volumes: training samples")
    sub.add_argument("--test", type=_positive, default=128, help="volumes: test samples")

    sub = _command(actions, "import", data_import, "turn NumPy files into a data set")
    sub.add_argument("paths", nargs="+", type=Path, metavar="X.npy Y.npy FOLDER", help="or XY.npz FOLDER")
    sub.add_argument("--channels", choices=("last", "first", "none"), default="last", help="where x has its channels")
    sub.add_argument("--classes", type=_positive, help="number of classes (default: largest label + 1)")
    sub.add_argument("--ignore", type=int, metavar="LABEL", help="label that counts for nothing, such as 255 or -1")
    sub.add_argument("--names", nargs="+", default=[], help="names of the values in y")
    sub.add_argument("--like", type=Path, help="folder of the training data that this is a test set for")

    sub = _command(actions, "inspect", data_inspect, "say what a data set holds, and whether it is whole")
    sub.add_argument("folder", type=Path)
    sub.add_argument("--verify", action="store_true", help="read every byte and compare hashes")
    _json(sub)

    bench = _command(commands, "bench", None, "measure parts of the program; start it with mpirun or srun")
    actions = bench.add_subparsers(dest="action", required=True, metavar="ACTION")
    sub = _command(actions, "allreduce", bench_allreduce, "time the sums of gradients beside the MPI library's own")
    sub.add_argument("--algorithms", metavar="NAME,NAME", help="which (default: all that can run on these ranks)")
    sub.add_argument("--dtype", choices=("float32", "float64", "bf16"), default="float32")
    _sizes(sub)

    sub = _command(commands, "calibrate", calibrate, "measure this machine: by that sums are chosen, and plans made")
    sub.add_argument("words", nargs="*", metavar="CONFIG.toml section.key=value", help="a run, to measure its layers")
    sub.add_argument("-o", "--out", type=Path, metavar="MACHINE.json", help="default: where runs look, see the README")
    sub.set_defaults(resume=None)
    _sizes(sub)

    sub = _command(commands, "doctor", doctor, "check this machine: MPI, compiled kernels, memory")
    sub.add_argument("--mpi", action="store_true", help="also start two ranks")
    _json(sub)
    return top


def _command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    sub: argparse.ArgumentParser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    sub.set_defaults(run=run, parser=sub)
    return sub


def _json(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--json", action="store_true", help="end stdout with one line of JSON")


def _sizes(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--sizes", metavar="64K,1M", help="bytes of the buffers (default: 1K to 64M, times 4)")
    sub.add_argument("--repeat", type=_positive, metavar="N", help="rounds of which the median counts")
    sub.add_argument("--quick", action="store_true", help="two small sizes, few rounds: only to see that it runs")
    _json(sub)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number, at least 1, not {text!r}")
    return int(text)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *args: object) -> None:
        from importlib.metadata import version

        print(f"hpctrain {version('hpctrain')}")
        parser.exit()
