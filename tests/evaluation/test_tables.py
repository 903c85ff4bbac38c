"""The tables of an evaluation: what is damaged in them."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest
from made_up_evaluation import SCHEMA

from patchrank.errors import UserError
from patchrank.evaluation import figures, neighbours

READERS = [(figures.figures, [], None), (figures.by_class, None), (figures.retrieval, None), (neighbours.neighbours,)]


@pytest.mark.parametrize("names", [["bad.parquet"], ["good.parquet", "bad.parquet"]])
def test_a_damaged_table_is_named(tmp_path, names):
    pq.write_table(SCHEMA.empty_table(), tmp_path / "good.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"not Parquet")
    for read, *rest in READERS:
        with pytest.raises(UserError, match=r"cannot be read \(.*\); evaluate again"):
            read(str(tmp_path), names, *rest)
