"""Write the dashboards: ``python -m deploy.grafana``."""

import json
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.fleet import fleet
from deploy.grafana.service import service
from deploy.grafana.sparsity import sparsity

FOLDER = Path(__file__).parent / "dashboards"


def files() -> dict[str, str]:
    """The text of every file of ``FOLDER``, by name."""
    boards: list[Dashboard] = [service(), sparsity(), fleet()]
    return {f"{board.uid}.json": json.dumps(board, cls=JSONEncoder, indent=2) + "\n" for board in boards}


if __name__ == "__main__":
    for name, text in files().items():
        (FOLDER / name).write_text(text)
