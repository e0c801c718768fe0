"""The share of a prompt's tokens that ZipVL let attend, layer by layer, from a result of `bench overhead --plan zipvl`.

python benchmarks/zipvl_shares.py benchmarks/results/overhead-kv-cpu.json benchmarks/results/zipvl-shares.png
"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure


def draw(result: Path, out: Path) -> None:
    document = json.loads(result.read_text("utf-8"))
    figure = Figure(figsize=(6, 2.8), layout="constrained")
    panel = figure.add_subplot()
    for row in document["results"]:
        shares = row["effect"].get("zipvl", {}).get("tokens_attending", {})
        if row["phase"] == "prefill" and shares:
            layers = [int(layer) for layer in shares]
            panel.bar(layers, [100 * share for share in shares.values()], color="#0072B2")
            panel.set_title(f"{document['model']['id']}, {row['length']:,} tokens, {row['plan']}", fontsize=10)
            break
    else:
        raise SystemExit(f"{result} holds no prefill in which zipvl chose tokens.")
    panel.set(xlabel="layer", ylabel="tokens that attend, %", ylim=(0, 100))
    panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    draw(*map(Path, sys.argv[1:]))
