"""Compress the bundled model at two sizes; statistics and decompositions are made once. Usage: python … OUT_DIR"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import spectrim


def main(folder: Path) -> None:
    for ratio in (0.2, 0.4):
        out = folder / f"reference-{ratio}"
        result = spectrim.compress(
            "reference", ratio=ratio, text="reference", out=out, work=folder / "work", sequences=16, length=128
        )
        model = AutoModelForCausalLM.from_pretrained(out)
        tokenizer = AutoTokenizer.from_pretrained(out)
        found = spectrim.evaluate(model, tokenizer, "reference-evaluation", window=128, limit=10)
        print(f"{ratio}: {result.summary['parameters']['total_after']:,} parameters, perplexity {found.perplexity:.2f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
