"""Large numbers as people type them: 300B tokens. Imports nothing of ours."""

import math
import re

FACTORS = {"k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}


def quantity(setting: str, text: str) -> float:
    """300B, 50e9, 1.5T, 85M as a number above 0. Raises ValueError naming the setting."""
    found = re.fullmatch(r"([\d_]*\.?\d+(?:e\+?\d+)?)\s*([kmgbt]?)", text.strip().lower())
    value = float(found[1].replace("_", "")) * FACTORS.get(found[2], 1.0) if found else 0.0
    if not (math.isfinite(value) and value > 0):
        raise ValueError(
            f"{setting} {text}: must be a number above 0, such as 300B, 50e9 or 1.5T (K, M, B or "
            "G, T: thousands to millions of millions)"
        )
    return value
