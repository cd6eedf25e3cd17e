"""The model card (`README.md`) of a quantized checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .report import layout_text, summary_lines


def model_card(report: Mapping[str, Any], base_model: str) -> str:
    """Markdown with the hub's front matter; the first thing it says is to import lutgemm before loading."""
    layouts = sorted({layout_text(layer["layout"]) for layer in report["layers"]})
    facts = "\n".join(f"- {line}" for line in summary_lines(report) if not line.startswith("quantizing took"))
    return f"""---
library_name: lutgemm
base_model: {json.dumps(base_model)}
base_model_relation: quantized
tags:
- lutgemm
- quantized
---

# {base_model}, quantized with lutgemm

**`import lutgemm` before loading.** Without it transformers does not know this format: it only warns, and runs the
model with random weights.

```python
import lutgemm  # before from_pretrained

model = lutgemm.load("PATH_OR_ID")
```

or, the same by hand:

```python
import lutgemm
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH_OR_ID")
tokenizer = AutoTokenizer.from_pretrained("PATH_OR_ID")
```

## What was done

- weights: {"; ".join(layouts)}
{facts}

Every layer with its error, and everything that was left alone: `report.md`, `report.json`.
`lutgemm verify THIS_FOLDER ORIGINAL` recomputes them. Licence and intended use are those of the base model.
"""
