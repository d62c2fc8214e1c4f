"""Our model classes inside vLLM, through its own seams: general plugin, model registry, worker extension."""
