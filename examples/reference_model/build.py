"""Train, widen and export the reference model, in one command.

    python examples/reference_model/build.py --out models --size 1GB --type F16 --type Q4_K
    python examples/reference_model/build.py --out models --size 4.8GB --type F16 --hf --from /models/trained-base

The trained base is kept in the cache folder and used again. What exists already is not built again.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

if __name__ == "__main__":
    # Run from a checkout: nothing of it needs to be installed, and this folder itself is no place to import from.
    _here = Path(__file__).resolve().parent
    sys.path[:1] = [str(_here.parent), str(_here.parents[1] / "plugin")]

from expertier.errors import ExpertierError
from expertier.paths import cache_dir
from reference_model.checkpoint import Checkpoint
from reference_model.config import ReferenceConfig
from reference_model.export_gguf import QUANTISATIONS, export_gguf
from reference_model.export_hf import export_hf, write_configuration
from reference_model.files import require_space
from reference_model.widen import parse_size

# Grows when a change makes earlier trained models differ from what this code would train.
_RECIPE = 2
# Training text beyond what fits into the time costs only tokenising.
_BYTES_PER_MINUTE, _FEWEST_BYTES, _MOST_BYTES = 200_000, 60_000, 4_000_000


def reference_base(
    *, minutes: float = 3.0, seed: int = 0, config: ReferenceConfig | None = None, progress: bool = True
) -> Path:
    """Return the folder of the trained base, training it unless the cache holds it.

    The folder is a Hugging Face model with ``prompts.json`` (held-out text) and ``training.json`` (how it was trained
    and what held-out text shows) beside it.

    Parameters
    ----------
    minutes : float
        Time for the training loop; collecting text and measuring come on top (about half a minute).
    seed : int
        Seed of weights and data order.
    config : ReferenceConfig, optional
        Another shape than the default one.
    progress : bool
        Show what is going on, on standard error.
    """
    config = config or ReferenceConfig()
    key = json.dumps([_RECIPE, dataclasses.asdict(config), seed, minutes])
    folder = cache_dir() / "reference" / f"base-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    with _only_one(folder.with_suffix(".lock")):
        if not (folder / "config.json").is_file():
            _train_base(folder, config, minutes, seed, progress)
    return folder


@contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    """Let two builds at once train once."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _train_base(folder: Path, config: ReferenceConfig, minutes: float, seed: int, progress: bool) -> None:
    # Here, because building from a trained model needs none of them.
    import torch
    from safetensors.torch import save_file

    from reference_model.corpus import collect
    from reference_model.model import load_model, to_hf
    from reference_model.tokenizer import train_tokenizer
    from reference_model.train import evaluate, train

    _say(progress, "collecting text ...")
    corpus = collect(
        int(min(max(_BYTES_PER_MINUTE * minutes, _FEWEST_BYTES), _MOST_BYTES)),
        # A model for tests needs fewer prompts, and soon.
        max_held_out_bytes=250_000 if minutes >= 1 else 100_000,
    )
    _say(progress, f"{len(corpus.domains)} domains: {', '.join(corpus.domains)}")
    tokenizer = train_tokenizer([text for domain in corpus.domains for text in corpus.train[domain]], config.vocab_size)
    model, seen = train(config, tokenizer, corpus, minutes=minutes, seed=seed, progress=progress)

    with tempfile.TemporaryDirectory(prefix=".base-", dir=folder.parent) as scratch:
        work = Path(scratch) / "base"
        work.mkdir()
        require_space(work, 4 * sum(parameter.numel() for parameter in model.parameters()))
        weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in to_hf(model).items()}
        save_file(weights, work / "model.safetensors", metadata={"format": "pt"})
        tokenizer.save(str(work / "tokenizer.json"))
        (work / "config.json").write_text(json.dumps(config.to_hf(), indent=1) + "\n", encoding="utf-8")
        checkpoint = Checkpoint(work)
        write_configuration(checkpoint, work, 1)
        _say(progress, "measuring on held-out text ...")
        # As exported: rounded to bfloat16.
        found = evaluate(load_model(checkpoint), tokenizer, corpus)
        record = {
            "minutes": minutes,
            "seed": seed,
            "tokens": seen,
            "corpus": corpus.fingerprint(),
            "torch": torch.__version__,
            **dataclasses.asdict(found),
        }
        (work / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        corpus.write_prompts(work / "prompts.json")
        work.rename(folder)
    for domain, loss in found.loss.items():
        _say(progress, f"  {domain:20} {loss:.2f} nats per token, {found.bits_per_byte[domain]:.2f} bits per byte")


def reference_gguf(
    size: str | int | None = "1GB",
    type: str = "F16",
    minutes: float = 3.0,
    out: Path | None = None,
    progress: bool = True,
    *,
    seed: int = 0,
    base: Path | None = None,
) -> Path:
    """Return a GGUF of the reference model, building what is missing.

    Parameters
    ----------
    size : str or int, optional
        Wanted size of the file, e.g. ``"1GB"``; None for the model as trained (about 56 MB in float16).
    type : {"F16", "Q8_0", "Q4_K", "Q4_K_M"}
        Type of the weights.
    minutes : float
        Training time if the base is not in the cache.
    out : Path, optional
        Folder for the file; by default the cache's.
    progress : bool
        Show what is going on, on standard error.
    seed : int
        Seed of the training.
    base : Path, optional
        A Hugging Face folder of the same architecture to use instead of training.

    Raises
    ------
    ExpertierError
        Named reasons: no room on the disk, an unknown type, a base of another architecture.
    """
    checkpoint = Checkpoint(base or reference_base(minutes=minutes, seed=seed, progress=progress))
    path = (out or cache_dir() / "reference") / f"{_stem(checkpoint, size)}-{type.lower().replace('_', '')}.gguf"
    if not path.is_file():
        with _bar(path.name, progress) as advance:
            export_gguf(checkpoint, path, kind=type, size=None if size is None else parse_size(size), progress=advance)
    return path


def reference_hf(
    size: str | int | None = "1GB",
    minutes: float = 3.0,
    out: Path | None = None,
    progress: bool = True,
    *,
    seed: int = 0,
    base: Path | None = None,
) -> Path:
    """Return a Hugging Face folder (bfloat16) of the reference model; parameters as of :func:`reference_gguf`."""
    checkpoint = Checkpoint(base or reference_base(minutes=minutes, seed=seed, progress=progress))
    folder = (out or cache_dir() / "reference") / f"{_stem(checkpoint, size)}-hf"
    if not (folder / "config.json").is_file():
        with _bar(folder.name, progress) as advance:
            export_hf(checkpoint, folder, size=None if size is None else parse_size(size), progress=advance)
    return folder


def prompts_of(base: Path) -> Path:
    """Return the held-out text that belongs to a base, collecting it if the base brings none."""
    own = base / "prompts.json"
    if own.is_file():
        return own
    path = cache_dir() / "reference" / "prompts.json"
    if not path.is_file():
        from reference_model.corpus import collect

        path.parent.mkdir(parents=True, exist_ok=True)
        collect().write_prompts(path)
    return path


def _stem(checkpoint: Checkpoint, size: str | int | None) -> str:
    """Name products after their base, so that another base never passes for this one."""
    weights = sorted(checkpoint.folder.glob("model*.safetensors"))
    digest = hashlib.sha256()
    for path in [checkpoint.folder / "config.json", checkpoint.tokenizer_path, *weights]:
        digest.update(path.read_bytes())
    wanted = "trained" if size is None else f"{parse_size(size) / 1e9:g}gb"
    return f"reference-{digest.hexdigest()[:8]}-{wanted}"


@contextmanager
def _bar(name: str, progress: bool) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task(f"writing {name}", total=None)
        yield lambda written, total: bar.update(task, completed=written, total=total)


def _say(progress: bool, text: str) -> None:
    if progress:
        print(text, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the products")
    parser.add_argument("--size", help="size of each product, e.g. 1GB; without it the model stays as trained")
    parser.add_argument(
        "--type", action="append", default=[], type=str.upper, choices=list(QUANTISATIONS), dest="types"
    )
    parser.add_argument("--hf", action="store_true", help="also a Hugging Face folder in bfloat16")
    parser.add_argument("--minutes", type=float, default=3.0, help="training time (default 3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--from", type=Path, dest="base", help="a trained Hugging Face folder to use instead of training"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")
    chosen = parser.parse_args(arguments)
    types = chosen.types or ([] if chosen.hf else ["F16"])
    progress = not chosen.quiet
    try:
        base = chosen.base or reference_base(minutes=chosen.minutes, seed=chosen.seed, progress=progress)
        chosen.out.mkdir(parents=True, exist_ok=True)
        products = [reference_gguf(chosen.size, kind, out=chosen.out, progress=progress, base=base) for kind in types]
        if chosen.hf:
            products.append(reference_hf(chosen.size, out=chosen.out, progress=progress, base=base))
        prompts = chosen.out / "prompts.json"
        # Those of this base: text that is held out for another one may have trained it.
        prompts.write_bytes(prompts_of(base).read_bytes())
    except ExpertierError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing half-made was left behind", file=sys.stderr)
        return 130
    for product in [*products, prompts]:
        print(product)
    return 0


if __name__ == "__main__":
    sys.exit(main())
