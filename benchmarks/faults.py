"""Faults put into a bank: the share that is found, by kind of file; it must be 100 %.

    python benchmarks/faults.py --faults 1000 --seed 0

A small bank that has every kind of file and every encoding is made and damaged again
and again: files deleted, emptied, cut, one bit flipped at the head, the tail or
anywhere. For each fault: does `verify` name the file (`--full` where only its bytes
tell)? Does a trainer refuse it by name, or learn from the very same numbers because it
does not read that file; or does it learn from wrong ones (missed)? One fault of
`--repair-every`, drawn, is left to `precompute --repair` and the bank compared; the
others are undone. Exit 1 unless all are found and mended.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from manifests.loading import load_job
from pipeline.precompute import precompute
from tests.conftest import bank_identity
from tests.injected_faults import (
    DAMAGES,
    KINDS,
    block_of,
    can_be_told,
    files_of,
    found_by_trainer,
    found_by_verify,
    inject,
    learned,
    make_varied_bank,
    repair,
)

COLUMNS = ("faults", "verify", "refused", "same", "missed", "tried", "mended")


def is_mended(job: Path, bank: Path, path: str, identity: dict[str, object]) -> bool:
    """Whether repair makes the bank what it was, and computes one block at most."""
    outcome = repair(job, bank)
    expected = 0 if block_of(path) is None else 1
    return outcome.result.blocks == expected and bank_identity(bank) == identity


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repair-every", type=int, default=10)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    cases = [(k, d) for k in KINDS for d in DAMAGES if can_be_told(k, d)]
    table = {kind: Counter(dict.fromkeys(COLUMNS, 0)) for kind in KINDS}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        job = make_varied_bank(Path(name))
        precompute(load_job(str(job)), quiet=True)
        bank = job.parent / "bank"
        identity, undamaged = bank_identity(bank), learned(bank)
        for number in range(args.faults):
            kind, damage = cases[number % len(cases)]
            fault = inject(bank, str(rng.choice(files_of(bank)[kind])), damage, rng)
            line = table[kind]
            line["faults"] += 1
            line["verify"] += found_by_verify(fault)
            said = found_by_trainer(fault, undamaged)
            line[said if said in COLUMNS else "missed"] += 1
            if said not in COLUMNS:
                print(f"{fault.path} {damage} {fault.where}: {said}", flush=True)
            if kind == "record" or rng.random() * args.repair_every > 1:
                fault.undo()
                continue
            line["tried"] += 1
            if is_mended(job, bank, fault.path, identity):
                line["mended"] += 1
            else:
                print(f"{fault.path} {damage} {fault.where}: not mended", flush=True)
                fault.undo()
    total = sum(table.values(), Counter(dict.fromkeys(COLUMNS, 0)))
    print(f"{'file':22}" + "".join(f"{column:>9}" for column in COLUMNS))
    for kind, line in {**table, "all": total}.items():
        print(f"{kind:22}" + "".join(f"{line[column]:9}" for column in COLUMNS))
    found = total["verify"] / total["faults"]
    print(
        f"{total['faults']} faults, seed {args.seed}: {found:.1%} found by verify, "
        f"{total['missed']} missed by a trainer, {total['mended']} of {total['tried']} "
        f"mended as they were ({time.monotonic() - started:.0f} s)"
    )
    is_sound = not total["missed"] and total["mended"] == total["tried"]
    return 0 if found == 1 and is_sound else 1


if __name__ == "__main__":
    sys.exit(main())
