"""Conditions on rows: ``COLUMN OP VALUE`` over what the bank's index says of each.

One small grammar, read strictly, that becomes an Arrow expression; nothing is ever
evaluated. Columns are those of ``index/``: ``shard``, ``key``, ``label.NAME``,
``valid.PASS`` and ``reason.PASS``; values are JSON. A row whose column is empty (no
label) meets no condition on it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from manifests.errors import BankError
from manifests.suggestions import close_matches

_CONDITION = re.compile(
    r"\s*(?P<column>[^\s=!<>]+)(?:\s*(?P<op>==|!=|<=|>=|<|>)|\s+(?P<word>not\s+in|in)\b)"
    r"\s*(?P<value>.+?)\s*",
    re.DOTALL,
)
_PREFIXES = ("label.", "valid.", "reason.")
_FORM = (
    "COLUMN OP VALUE, such as 'label.class in [3, 5]' or 'shard == \"a.tar\"' (OP: == "
    "!= < <= > >= in, not in; VALUE: JSON)"
)
_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "==": lambda column, value: column == value,
    "!=": lambda column, value: column != value,
    "<": lambda column, value: column < value,
    "<=": lambda column, value: column <= value,
    ">": lambda column, value: column > value,
    ">=": lambda column, value: column >= value,
}


@dataclass(frozen=True)
class Condition:
    """What a row must meet.

    Attributes:
        column: of the index.
        op: ``==``, ``!=``, ``<``, ``<=``, ``>``, ``>=``, ``in`` or ``not in``.
        value: JSON value; a list for ``in`` and ``not in``.
    """

    column: str
    op: str
    value: Any

    @property
    def text(self) -> str:
        """The condition as a bank's record keeps it.

        Of keys only a digest: a condition may name a sample that is left behind.
        """
        shown = json.dumps(self.value)
        if self.column == "key":
            shown = f"sha256:{hashlib.sha256(shown.encode()).hexdigest()}"
        return f"{self.column} {self.op} {shown}"

    def expression(self, schema: pa.Schema) -> pc.Expression:
        """Returns it as an Arrow expression.

        Args:
            schema: of the index.

        Raises:
            BankError: the index has no such column, or it holds other values.
        """
        columns = [name for name in schema.names if is_column(name)]
        if self.column not in columns:
            raise BankError(
                f"conditions must be on columns of the index ({', '.join(columns)}), "
                f"got {self.column!r}{close_matches(self.column, columns)}"
            )
        kind = schema.field(self.column).type
        is_list = self.op in ("in", "not in")
        for one in self.value if is_list else [self.value]:
            self._check_value(one, kind, is_list)
        column = pc.field(self.column)
        if not is_list:
            return _COMPARISONS[self.op](column, pa.scalar(self.value, kind))
        is_in = column.isin(pa.array(self.value, kind))
        return column.is_valid() & (is_in if self.op == "in" else ~is_in)

    def _check_value(self, value: Any, kind: pa.DataType, is_list: bool) -> None:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if pa.types.is_boolean(kind):
            rule, is_right = "true or false", isinstance(value, bool)
        elif pa.types.is_integer(kind):
            rule, is_right = "whole numbers", is_number and isinstance(value, int)
        elif pa.types.is_floating(kind):
            rule, is_right = "numbers", is_number
        else:
            rule, is_right = 'text in quotes, such as "a"', isinstance(value, str)
        if not is_right:
            raise BankError(
                f"values of {self.column} must be {rule}, got {json.dumps(value)}"
            )
        is_ordered = pa.types.is_integer(kind) or pa.types.is_floating(kind)
        if not (is_list or is_ordered or self.op in ("==", "!=")):
            raise BankError(
                f"conditions on {self.column} must be ==, !=, in or not in, got "
                f"{self.op}"
            )


def is_column(name: str) -> bool:
    """Whether a column of the index tells of the sample, not of its place here."""
    return name in ("shard", "key") or name.startswith(_PREFIXES)


def parse_condition(text: str) -> Condition:
    """Returns the condition that a text means.

    Raises:
        BankError: it is none.
    """
    found = _CONDITION.fullmatch(text)
    if found is None:
        raise BankError(f"conditions must be {_FORM}, got {text!r}")
    op = found["op"] or " ".join(found["word"].split())
    try:
        value = json.loads(found["value"])
    except ValueError as error:
        raise BankError(
            f"conditions must be {_FORM}, got the value {found['value']} in {text!r} "
            f"({error})"
        ) from error
    if (op in ("in", "not in")) != isinstance(value, list) or value == []:
        raise BankError(
            f"conditions must have a list of values after `in` and `not in` alone, "
            f"got {text!r}"
        )
    return Condition(found["column"], op, value)
