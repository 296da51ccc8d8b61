"""`--minutes`: how long the tests of this folder inject faults. Without it they inject a fixed number."""


def pytest_addoption(parser):
    parser.addoption("--minutes", type=float, default=None, help="inject faults for this many minutes")
