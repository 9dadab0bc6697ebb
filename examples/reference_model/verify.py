"""Show that widening and exporting keep routing and text.

python examples/reference_model/verify.py          # the cached base, trained if there is none
python examples/reference_model/verify.py --from /models/trained-base --factor 8
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    _here = Path(__file__).resolve().parent
    sys.path[:1] = [str(_here.parent), str(_here.parents[1] / "plugin")]

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from expertier.errors import ExpertierError
from reference_model.build import prompts_of, reference_base
from reference_model.checkpoint import Checkpoint
from reference_model.export_gguf import export_gguf
from reference_model.export_hf import export_hf
from reference_model.model import load_model
from reference_model.tokenizer import load_tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far two models agree on the same text.

    Attributes
    ----------
    logit_difference : float
        Largest absolute difference of any logit.
    top_token : float
        Share of positions where both prefer the same token.
    loss : tuple of float
        Cross-entropy of both in nats per token.
    same_routes : list of float
        By layer, the share of tokens for which both choose the same set of experts; empty where routes are unknown.
    """

    logit_difference: float
    top_token: float
    loss: tuple[float, float]
    same_routes: list[float]


@torch.inference_mode()
def torch_logits(checkpoint: Checkpoint, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Return logits of shape ``(tokens, vocabulary)`` and routes of shape ``(layers, tokens, experts per token)``."""
    model = load_model(checkpoint)
    output = model(torch.tensor([ids]))
    return model.logits(output.hidden)[0], output.routes


def llama_logits(path: Path, ids: list[int]) -> NDArray[np.float32]:
    """Return stock llama.cpp's logits for a GGUF file, shape ``(tokens, vocabulary)``."""
    import llama_cpp

    llama = llama_cpp.Llama(
        str(path), n_ctx=len(ids) + 8, n_batch=len(ids), n_threads=2, n_gpu_layers=0, logits_all=True, verbose=False
    )
    try:
        llama.eval(ids)
        return np.array(llama.scores[: len(ids)], np.float32)
    finally:
        llama.close()


def compare(ids: list[int], one: Tensor, two: Tensor, routes: tuple[Tensor, Tensor] | None = None) -> Agreement:
    """Compare two models' logits, and their routes where both are known."""
    targets = torch.tensor(ids[1:])
    same: list[float] = []
    if routes is not None:
        first, second = (chosen.sort(-1).values for chosen in routes)
        same = (first == second).all(-1).float().mean(1).tolist()
    return Agreement(
        logit_difference=(one - two).abs().max().item(),
        top_token=(one.argmax(-1) == two.argmax(-1)).float().mean().item(),
        loss=(functional.cross_entropy(one[:-1], targets).item(), functional.cross_entropy(two[:-1], targets).item()),
        same_routes=same,
    )


def verify(base: Path, *, factor: int = 8, tokens: int = 384) -> dict[str, Agreement]:
    """Compare a base with what is made of it, on held-out text of all domains.

    Parameters
    ----------
    base : Path
        The trained Hugging Face folder.
    factor : int
        Widening factor of everything that is compared.
    tokens : int
        Tokens of text.

    Returns
    -------
    dict of str to Agreement
        By product: the widened weights in bfloat16 (safetensors) and the GGUF files.
    """
    checkpoint = Checkpoint(base)
    tokenizer = load_tokenizer(base)
    prompts = json.loads(prompts_of(base).read_text(encoding="utf-8"))
    firsts = list({prompt["domain"]: prompt["text"] for prompt in prompts}.values())
    share = -(-tokens // len(firsts))
    ids = [token for text in firsts for token in tokenizer.encode(text[:2000]).ids[:share]][:tokens]
    logits, routes = torch_logits(checkpoint, ids)
    found = {}
    with tempfile.TemporaryDirectory(prefix="expertier-verify-") as scratch:
        folder = Path(scratch) / "hf"
        export_hf(checkpoint, folder, factor=factor)
        wide, wide_routes = torch_logits(Checkpoint(folder), ids)
        found[f"safetensors x{factor}"] = compare(ids, logits, wide, (routes, wide_routes))
        for kind, width in (("F16", 1), ("F16", factor), ("Q8_0", factor), ("Q4_K_M", factor), ("Q4_K", factor)):
            path = Path(scratch) / "model.gguf"
            export_gguf(checkpoint, path, kind=kind, factor=width)
            found[f"GGUF {kind} x{width}"] = compare(ids, logits, torch.from_numpy(llama_logits(path, ids)))
    return found


def main() -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", type=Path, dest="base", help="a trained Hugging Face folder; default the cached base")
    parser.add_argument("--factor", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=384)
    parser.add_argument("--minutes", type=float, default=3.0, help="training time if there is no base yet")
    chosen = parser.parse_args()
    try:
        base = chosen.base or reference_base(minutes=chosen.minutes)
        found = verify(base, factor=chosen.factor, tokens=chosen.tokens)
    except ExpertierError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("| product | largest logit difference | same top token | loss base -> product | same routes, worst layer |")
    print("|---|---|---|---|---|")
    for name, agreement in found.items():
        routes = f"{100 * min(agreement.same_routes):.1f} %" if agreement.same_routes else "-"
        before, after = agreement.loss
        print(
            f"| {name} | {agreement.logit_difference:.2g} | {100 * agreement.top_token:.1f} % "
            f"| {before:.4f} -> {after:.4f} | {routes} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
