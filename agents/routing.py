"""Which experts an engine sent each token to, as a column of the ledger.

A token's entry is base64 of little-endian int16, [layers, experts per token] in C order, with a row for every layer
(those of dense layers mean nothing); `NO_ROUTING` where the engine recorded none. Text, so that a ledger is written as
it stands, as JSON and as Parquet.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from polyturn.agents.policy import PolicyFault

NO_ROUTING = ""
UNKNOWN_EXPERT = -1


def read_routing(text: str, *, num_tokens: int) -> tuple[str, ...]:
    """The entries of `num_tokens` tokens from SGLang's `meta_info.routed_experts`: base64 of int32 [tokens, ...].

    Raises:
        PolicyFault: the record is not of so many tokens, or names experts that cannot be.
    """
    try:
        flat = np.frombuffer(base64.b64decode(text, validate=True), dtype="<i4")
    except (binascii.Error, ValueError) as error:
        raise PolicyFault(f"the engine's routed experts are not base64 of int32: {error}") from error
    if num_tokens == 0:
        return ()
    if flat.size == 0 or flat.size % num_tokens:
        raise PolicyFault(
            f"the engine's routed experts are {flat.size} numbers, which is no record of {num_tokens} tokens"
        )
    rows = flat.reshape(num_tokens, -1)
    if rows.max() > np.iinfo(np.int16).max:
        raise PolicyFault(f"the engine's routed experts name expert {rows.max()}")
    small = rows.astype("<i2")
    return tuple(base64.b64encode(row.tobytes()).decode("ascii") for row in small)


def routing_array(column: Sequence[str]) -> npt.NDArray[np.int16] | None:
    """A ledger's column as an array [T, layers x experts per token], `UNKNOWN_EXPERT` where nothing was recorded.

    None when the whole column holds no record.
    """
    found = [np.frombuffer(base64.b64decode(entry), dtype="<i2") if entry else None for entry in column]
    widths = {len(row) for row in found if row is not None}
    if not widths:
        return None
    assert len(widths) == 1, f"routed experts of several widths: {widths}"
    array = np.full((len(found), *widths), UNKNOWN_EXPERT, dtype=np.int16)
    for index, row in enumerate(found):
        if row is not None:
            array[index] = row
    return array
