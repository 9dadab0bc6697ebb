"""Writes text to train route predictors on: the side of the reference model's corpus that is not held out.

``python examples/benchmarks/routing/texts.py training.json`` makes a file for ``expertier profile --text``. The other
side is the ``prompts.json`` beside every reference model: a hash of a file's contents decides, so nothing is on both.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[3] / "plugin"), str(Path(__file__).parents[2])]

from reference_model.corpus import collect  # noqa: E402

_MOST_PER_DOMAIN = 6_000_000  # characters
_LONGEST = 6000  # characters of a stretch: a few hundred tokens, the rest of a long file is other stretches


def main(out: Path) -> None:
    corpus = collect(_MOST_PER_DOMAIN)
    texts = [
        {"domain": domain, "text": text[start : start + _LONGEST]}
        for domain in corpus.domains
        for text in corpus.train[domain]
        for start in range(0, len(text), _LONGEST)
    ]
    out.write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")
    print(f"{out}: {len(texts)} texts of {len(corpus.domains)} domains")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON file to write")
    main(parser.parse_args().out)
