"""The offline job: turns a Swish checkpoint into a ProSparse one (arXiv 2402.13516)."""
