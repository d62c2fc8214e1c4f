"""vLLM model classes whose feed-forward layers run on the sparse op."""
