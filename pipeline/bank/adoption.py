"""Taking up objects that an ended attempt left without a commit."""

from __future__ import annotations

import numpy as np

from manifests.errors import BankError
from manifests.storage import Store
from pipeline.bank.arrays import ArraySpec
from pipeline.bank.objects import decode_object, object_crc32c


def refuse_orphan(store: Store, path: str) -> BankError:
    """Returns the error for an object that is there, uncommitted and not ours."""
    return BankError(
        f"{store.url_of(path)} is there already, uncommitted and with other contents; "
        "run the same command with --repair, it removes what no commit names"
    )


def adopt_object(
    store: Store,
    path: str,
    spec: ArraySpec,
    computed: tuple[int, int],
    usable: np.ndarray,
) -> tuple[int, int]:
    """Returns size and crc32c of an object that an earlier attempt left, once checked.

    Equal bytes are taken at once. An attempt on an accelerator may differ in the last
    bits: it is kept if it is whole and the same rows are missing in it.

    Args:
        store: the bank's.
        path: of the object in it.
        spec: of its array.
        computed: size in bytes and crc32c of what this attempt made.
        usable: (block_rows,), which rows are not missing.

    Raises:
        BankError: it is damaged, or other rows are missing in it.
    """
    data = store.read(path, computed[0])
    stored = (len(data), object_crc32c([data]))
    if stored != computed:
        try:
            rows = decode_object(data, spec)
        except BankError as error:
            raise refuse_orphan(store, path) from error
        fill = spec.fill_value
        flat = rows.reshape(len(rows), -1)
        same = flat == fill if fill == fill else np.isnan(flat)
        if not np.array_equal(~same.all(axis=1), usable):
            raise refuse_orphan(store, path)
    return stored
