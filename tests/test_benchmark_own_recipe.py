"""The benchmark of our own recipe's cost runs at toy size; whether its bound holds is not asked here."""

from __future__ import annotations

import json
import math
from pathlib import Path

from benchmarks import own_recipe, whole_run


def test_cost_over_whitened(tmp_path: Path) -> None:
    shape = {**whole_run.WARM_UP, "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 4}
    own, onepass = own_recipe.measure(tmp_path, shape, (8, 16), ("spectrim", "spectrim-onepass"), 2)
    for case in (own, onepass):
        data = json.loads(json.dumps(case.to_json()))
        assert 0 < data["min"] <= data["value"] <= data["max"] < math.inf and data["repeats"] == 2
        whitened, found = data["details"]["parameters"].values()
        assert abs(whitened - found) <= 48, "the same size, but for a direction"
        assert {"calibrate", "decompose", "allocate", "write"} <= data["details"]["stages"]["whitened"].keys()
    assert own.bound == own_recipe.WITHIN and onepass.bound is None
