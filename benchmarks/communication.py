"""Bytes that a training step of a sharded model sends, on paper: with AdamW and QuotientAdam.

Of the shapes of a Llama of 7 billion parameters, dealt to 8 and to 64 processes as
:mod:`quotientopt.optim.sharded.ownership` deals them. Nothing is run; the formula for QuotientAdam
is the one that ``tests/distributed/test_curves.py`` counts in a small run.

    python benchmarks/communication.py
"""

import json
from pathlib import Path

from quotientopt.optim.sharded.ownership import dealt

LAYERS, WIDTH, HIDDEN, WORDS, HEADS, RANK = 32, 4096, 11008, 32000, 32, 128
REFRESH_EVERY = 10
OUT = Path(__file__).parent / "results" / "communication.json"


def units():
    """(parameters, elements of state) of every unit: pairs, then matrices on the stream."""
    pair = 2 * WIDTH**2
    frames = 2 * (2 * WIDTH**2 + 2 * (HEADS * RANK) ** 2)
    found = [(pair, 2 * pair + frames)] * (2 * LAYERS)
    found += [(HIDDEN * WIDTH, 2 * HIDDEN * WIDTH + 2 * WIDTH**2)] * (3 * LAYERS)
    return found + [(WORDS * WIDTH, 2 * WORDS * WIDTH + 2 * WIDTH**2)] * 2


def bytes_sent(processes):
    """Gigabytes that one process sends in a step, in the mean over processes."""
    found = sorted(units(), key=lambda unit: -unit[1])
    parameters = sum(count for count, _ in found)
    share = (processes - 1) / processes
    owners = dealt([state for _, state in found], processes)
    state = sum(size for _, size in found)
    loads = [0] * processes
    for owner, (_, size) in zip(owners, found, strict=True):
        loads[owner] += size
    # FSDP2 in bfloat16: weights gathered in forward and backward, gradients reduced in float32.
    fsdp = parameters * share * (2 + 2 + 4)
    # float32 shards of gradients to owners, of updates back; weights where frames are made.
    quotient = 4 * parameters / processes * share * (2 + 1 / REFRESH_EVERY)
    # All gradients to all, as where every process orthogonalises every matrix.
    gather = 4 * parameters * share
    return {
        "processes": processes,
        "units": len(found),
        "fsdp_and_adamw": round(fsdp / 1e9, 2),
        "quotientadam_adds": round(quotient / 1e9, 2),
        "percent": round(100 * quotient / fsdp, 1),
        "gathering_gradients_adds": round(gather / 1e9, 2),
        "largest_share_of_state": round(max(loads) / state, 4),
    }


def table(rows):
    """The table of docs/distributed.md."""
    head = "| GPUs | FSDP2 + AdamW | QuotientAdam adds | of that | gathering all gradients adds |"
    lines = [head + " largest share of the state |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {row['processes']} | {row['fsdp_and_adamw']} | {row['quotientadam_adds']} | "
        f"{row['percent']} % | {row['gathering_gradients_adds']} | "
        f"{100 * row['largest_share_of_state']:.1f} % |"
        for row in rows
    ]
    return "\n".join(lines)


def main():
    rows = [bytes_sent(processes) for processes in (8, 64)]
    OUT.write_text(json.dumps({"gigabytes_per_gpu_and_step": rows}, indent=2) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
