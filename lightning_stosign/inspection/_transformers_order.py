"""Run as a program: prints the names and shapes of a transformers model's parameters, in order, as JSON.

Args: the path of a ``config.json``, and the architecture that it names.
"""

import json
import resource
import sys
from typing import Any

_MOST_MEMORY = 16 << 30  # bytes of addresses


def main(config_file: str, architecture: str) -> None:
    """Build the model without its weights and print what its parameters are."""
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_MEMORY, _MOST_MEMORY))
    import torch
    import transformers

    with open(config_file, encoding="utf-8") as file:
        content = json.load(file)
    # Only what a class of transformers itself is built from: no code beside the checkpoint, no other files.
    content.pop("auto_map", None)
    content.pop("quantization_config", None)
    known: Any = getattr(transformers, architecture)
    if not issubclass(known, transformers.PreTrainedModel):
        raise SystemExit(1)
    config = known.config_class.from_dict(content)
    with torch.device("meta"):
        model = known(config)
    print(json.dumps([[name, list(value.shape)] for name, value in model.named_parameters()]))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
