"""What the planner gave the experts, and what the kernel counts of them.

    python examples/benchmarks/planner/check_memory.py MODEL.gguf --text prompts.json

Every budget decodes the same texts in a process and a control group of its own. What the group holds beyond the experts
is told by a budget of a sixteenth: its peak without that budget. Nothing here is a time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from expertier.catalog import read_catalog
from expertier.comparison.hardware import describe_hardware
from expertier.comparison.limits import Confinement, find_confinement
from expertier.comparison.prompts import interleaved, read_texts
from expertier.planning.memory import memory_limits
from expertier.planning.plan import make_plan

_LEAST = "6.25%"


def decode(model: Path, text: Path, budget: int, tokens: int, texts: int) -> dict[str, int]:
    """In the child: decode some texts; what the manager itself counts."""
    from expertier_llamacpp import Llama

    llama = Llama(
        str(model),
        n_ctx=512,
        n_threads=1,
        n_threads_batch=1,
        verbose=False,
        expert_budget=budget,
        expert_profile="off",
    )
    for one in list(interleaved(read_texts(text)))[:texts]:
        llama.reset()
        for token in llama.tokenize(one.text.encode()[: 16 * tokens], add_bos=False)[:tokens]:
            llama.eval([token])
    stats = llama.offload.stats()
    llama.close()
    return {"resident_peak_bytes": stats.peak_resident_bytes, "loads": stats.decode.misses}


def confined(way: Confinement, arguments: list[str]) -> dict[str, Any]:
    """Run this script's child in a control group of its own."""
    group = way.open(None)
    try:
        done = subprocess.run(
            group.wrap([sys.executable, __file__, *arguments]), stdout=subprocess.PIPE, text=True, check=True
        )
        found: dict[str, Any] = json.loads(done.stdout)
        return {**found, "group_peak_bytes": group.usage().peak_bytes}
    finally:
        group.close()


def main() -> None:
    """Measure and print a JSON record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--budget", action="append")
    parser.add_argument("--tokens", type=int, default=64, help="of each text")
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--decode", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.decode is not None:
        found = decode(options.model, options.text, options.decode, options.tokens, options.texts)
        print(json.dumps(found))
        return
    way, reasons = find_confinement()
    if way is None:
        raise SystemExit(f"No control groups here: {reasons}")
    catalog = read_catalog(options.model)
    plans = [
        make_plan(catalog, budget, limits=memory_limits())
        for budget in (_LEAST, *(options.budget or ["12.5%", "20%", "35%", "50%", "70%", "85%"]))
    ]
    arguments = [str(options.model), "--text", str(options.text)]
    arguments += ["--tokens", str(options.tokens), "--texts", str(options.texts)]
    rows = [
        {
            "budget": plan.asked,
            "budget_bytes": plan.budget_bytes,
            **confined(way, [*arguments, "--decode", str(plan.budget_bytes)]),
        }
        for plan in plans
    ]
    beside = rows[0]["group_peak_bytes"] - rows[0]["budget_bytes"]
    for row in rows:
        row["experts_by_the_kernel_bytes"] = row["group_peak_bytes"] - beside
        row["of_the_budget"] = row["experts_by_the_kernel_bytes"] / row["budget_bytes"]
    record = {
        "hardware": vars(describe_hardware(options.model)),
        "model": options.model.name,
        "groups": way.name,
        "beside_the_experts_bytes": beside,
        "budgets": rows[1:],
    }
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
