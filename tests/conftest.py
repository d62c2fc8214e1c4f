import pytest

SHARED_SERVERS = {"server", "guarded"}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where tests are shared out over processes, those of a file stay together, and those that share a server, too."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        file = item.path.relative_to(config.rootpath).as_posix()
        fixtures = set(getattr(item, "fixturenames", ()))
        shares = file.startswith("tests/e2e/") and fixtures & SHARED_SERVERS
        item.add_marker(pytest.mark.xdist_group("server" if shares else file))
