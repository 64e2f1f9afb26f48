"""``python -m gconv.train``: train a network and save it with its record."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from gconv.system.cli import Parser, loading, main_args, number, run

PROG = "python -m gconv.train"
# The names of gconv.MODELS, which cannot be imported here without PyTorch. A test compares them.
_MODEL_NAMES = (
    "z2cnn, c-z2cnn, p4cnn, g-p4cnn-small, g-p4cnn, gc-p4cnn-small, gc-p4cnn, "
    "resnet44, p4m-resnet44, g-p4m-resnet44, gc-p4m-resnet44"
)


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    p = Parser(
        PROG,
        "Train a network on DATASET (rotdigits, rotmnist-regen or rotmnist) and save it with its record.\n\n"
        "The default recipe is the published one for rotated MNIST: Adam with learning rate 1e-2, which is divided\n"
        "by ten after 4/5 of the epochs, weight decay 1e-5, batches of 256, 50 epochs and no augmentation. The\n"
        "validation images are held out and scored after every epoch, unless --all-data is given. The test images are\n"
        "scored once, at the end. The checkpoint is written after every epoch, and when Ctrl-C or SIGTERM stops the\n"
        "run. A stopped run continues with --resume and gives the same network to the bit. Under torchrun, the\n"
        "processes share every batch.",
        "  python -m gconv.train rotdigits --model p4cnn --epochs 10\n"
        "  python -m gconv.train rotmnist-regen --model p4cnn --all-data --out p4cnn.pt\n"
        "  python -m gconv.train rotmnist-regen --model p4cnn --recipe modern --seed 1\n"
        "  python -m gconv.train rotdigits --model p4cnn --group p4m --separable gc_in --width 8\n"
        "  torchrun --nproc-per-node 2 -m gconv.train rotmnist-regen --model gc-p4cnn\n"
        "  python -m gconv.train rotmnist-regen --resume p4cnn.pt              (continue a stopped run)\n"
        "  python -m gconv.train rotdigits --resume converted.pt --epochs 20   (retrain a converted network)",
    )
    p.add_argument(
        "dataset", metavar="DATASET", help="name of the data set; GCONV_DATA=DIR is searched first"
    )
    p.add_argument("--model", metavar="NAME", help=f"one of {_MODEL_NAMES}")
    p.add_argument("--group", help="another group than the model's: z2, p2, p4, pm, pmm or p4m")
    p.add_argument("--separable", metavar="FORM", help="use separable layers: g, gc, gc_in, g_turned or gc_turned")
    p.add_argument("--width", type=number(int, 1), help="channels (of a ResNet's first stage), default as published")
    p.add_argument("--recipe", metavar="NAME", help="published (default) or modern; the options below change it")
    p.add_argument("--epochs", type=number(int, 0), help="default 50")
    p.add_argument("--seed", type=number(int, 0), help="seed of initial weights and data order, default 0")
    p.add_argument("--batch-size", type=number(int, 2), help="default 256, or all images if there are fewer")
    p.add_argument("--lr", type=number(float, 0, 1e3), help="learning rate, default 0.01")
    p.add_argument("--weight-decay", type=number(float, 0, 1e3), help="default 1e-5")
    p.add_argument("--all-data", action="store_true", default=None, help="train on the validation images too")
    p.add_argument("--snapshots", metavar="E,E,…", help="also keep the network after these epochs, in half precision")
    p.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    p.add_argument("--precision", help="of the forward pass: float32 (default) or bfloat16 (autocast)")
    p.add_argument("--compile", action="store_true", help="run the passes through torch.compile")
    p.add_argument(
        "--history", metavar="FILE", help="also write the history to FILE, one JSON line per epoch"
    )
    p.add_argument("--tensorboard", metavar="DIR", help="also log to DIR for TensorBoard, which must be installed")
    p.add_argument("--resume", metavar="CKPT", help="start from this checkpoint")
    p.add_argument("--out", metavar="FILE", help="default MODEL-DATASET-seedS.pt, or CKPT-retrained-DATASET-seedS.pt")
    p.add_argument("--force", action="store_true", help="replace --out if it exists")
    p.add_argument("--json", action="store_true", help="print the record as JSON on stdout")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (:func:`gconv.system.cli.run`)."""
    args = parser().parse_args(main_args(argv))
    return run(PROG, lambda: _command(args))


def _command(args: argparse.Namespace) -> None:
    with loading():
        from gconv.system.distributed import joined
        from gconv.system.memory import reuse_freed_memory
        from gconv.training.run import RunOptions, prepare

    options = {key: value for key, value in vars(args).items() if key != "json"}
    with joined(args.device) as device:
        reuse_freed_memory()
        training = prepare(RunOptions(**{**options, "device": device}))
        try:
            test = training.train()
        except KeyboardInterrupt:
            if training.out.exists():
                print(f"\nto continue: {PROG} {training.data.name} --resume {training.out}", file=sys.stderr)
            raise
        if test is None:  # a process that leaves the result to that of rank 0
            return
        if args.json:
            json.dump({"file": str(training.out), **training.record}, sys.stdout, indent=2, allow_nan=False)
            print()
        else:
            result = f"test error {test.error:.2f} % on {test.images:,} images of {training.data.name}"
            print(f"{training.model.spec.name}: {result}; saved to {training.out}")


if __name__ == "__main__":
    sys.exit(main())
