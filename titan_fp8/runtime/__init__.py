"""What every layer may lean on: logging, errors, device capabilities, seeds, registries. Nothing here knows a model."""
