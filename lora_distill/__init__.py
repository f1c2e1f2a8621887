"""LoRA distillation of guided diffusion models: one frozen W0, many roles."""

import os

# Loading a pipeline is not news: errors only, unless the user asks for more.
for library in ("TRANSFORMERS", "DIFFUSERS"):
    os.environ.setdefault(f"{library}_VERBOSITY", "error")
