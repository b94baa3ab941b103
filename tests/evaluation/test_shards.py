"""When the rows of a run are committed."""

import numpy as np

from robbench.evaluation.shards import Shards
from robbench.results.store import make_empty_rows


def test_rows_are_committed_as_often_as_asked():
    class Store:
        commits = 0

        def commit(self, shard, points):
            self.commits += 1
            return self.commits

    rows = {name: np.zeros(2) for name in ("distance", "seconds")} | {
        name: np.zeros(2, np.int64) for name in (
            "sample", "label", "prediction", "trial", "step", "forwards", "backwards", "zero_gradients", "nonfinite",
            "claimed",
        )
    }  # fmt: skip
    for seconds, commits in ((-1.0, 2), (1e9, 0)):
        store = Store()
        shards = Shards(store, make_empty_rows(), lambda exact: [], commit_seconds=seconds)
        shards.add("A", "robust", rows)
        shards.add("A", "robust", rows)
        assert store.commits == commits and shards.added == 4
