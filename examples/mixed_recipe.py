"""A recipe built in code: attention and FFN with methods, formats and ratios of their own, on a live model."""

from importlib.resources import files

from transformers import AutoModelForCausalLM, AutoTokenizer

import spectrim
from spectrim.recipe import Recipe

RECIPE = {
    "calibrate": {"sequences": 16, "length": 128},
    "groups": [
        {"match": ["q", "k", "v", "o"], "ratio": 0.3, "format": "pivot", "decompose": {"method": "whitened_svd"}},
        {"match": ["gate", "up", "down"], "ratio": 0.1, "decompose": {"method": "asvd", "alpha": 0.5}},
    ],
}


def main() -> None:
    folder = str(files("spectrim") / "assets" / "reference")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    result = spectrim.compress(model, Recipe.model_validate(RECIPE), text="reference", tokenizer=tokenizer)
    for name, choice in list(result.plan.choices.items())[:7]:
        print(name, dict(choice.formats), dict(choice.counts))
    print(result.summary["parameters"])


if __name__ == "__main__":
    main()
