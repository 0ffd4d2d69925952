"""Marks that geomstats' test cases carry."""


def pytest_configure(config):
    for name in ("random", "vec"):
        config.addinivalue_line("markers", f"{name}: a mark of geomstats' test cases")
