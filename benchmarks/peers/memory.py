"""Peak memory of peers against the number of examples in a batch.

    python -m benchmarks.peers.memory --candidates seed_tasks_175.jsonl --reference reference_256.jsonl

Above that of plain forward + backward with the same batches in the same process, on the tiny model.
"""

from __future__ import annotations

import torch

from benchmarks.common import parser, write_result
from benchmarks.peers.entries import ENTRIES, run_peer
from benchmarks.peers.task import save
from benchmarks.students import add_model_options, examples_of, student_checkpoint

BATCH_SIZES = (1, 2, 4, 8, 16)
# One of each way to hold the gradients.
COMPARED = (
    "montessori",
    "dattri-llm, Adam",
    "bergson, Adam",
    "kronfluence, identity",
    "Opacus + Adam in torch",
    "torch.func.vmap + Adam",
)


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    add_model_options(options, scored=16, references=4)
    options.set_defaults(model="tiny")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    candidates, references, rest = examples_of(arguments)
    task = arguments.work / "peers_memory" / "task.json"
    save(task, student_checkpoint(arguments, rest), candidates, references, batch_size=1)
    rows = []
    for name in COMPARED:
        extra = ["--memory", *map(str, BATCH_SIZES)]
        result = run_peer(ENTRIES[name], task, arguments.threads, limit=300, extra=extra)
        rows.append({"name": name, **result})
        print(f"{name}: {result.get('error', 'ok')}", flush=True)
    print(f"wrote {write_result('peers_memory', arguments, {'peers': rows})}")


if __name__ == "__main__":
    main()
