"""The OpenAI-compatible server around vLLM: settings, app, health, live sparsity, command line."""
