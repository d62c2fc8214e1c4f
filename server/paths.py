"""The paths there are, byte for byte as a request line spells them, and who may use each."""

from enum import Enum

from server.page import PAGE_PATHS

PROBE_PATHS = ("/livez", "/readyz", "/health")
METRICS_PATH = "/metrics"
CHAT_PATH = "/v1/chat/completions"
COMPLETIONS_PATH = "/v1/completions"
TOKENIZE_PATH = "/tokenize"
DETOKENIZE_PATH = "/detokenize"

# What of vLLM's routers is served.
API_PATHS = (CHAT_PATH, COMPLETIONS_PATH, "/v1/models", TOKENIZE_PATH, DETOKENIZE_PATH, "/version")

# The documentation page and what it loads.
DOCUMENTATION_PATHS = ("/docs", "/openapi.json", "/static/swagger-ui-bundle.js", "/static/swagger-ui.css")


class Access(Enum):
    """Who may use a path."""

    EVERYBODY = "everybody"
    METRICS = "the metrics_access setting decides"
    KEY = "whoever has a key"


ACCESS: dict[bytes, Access] = {
    **{path.encode(): Access.EVERYBODY for path in (*PROBE_PATHS, *PAGE_PATHS)},
    METRICS_PATH.encode(): Access.METRICS,
    **{path.encode(): Access.KEY for path in (*API_PATHS, *DOCUMENTATION_PATHS)},
}


def label(raw_path: bytes) -> str:
    """The path as a metric's label: a known one as it is, all others as "other"."""
    return raw_path.decode() if raw_path in ACCESS else "other"
