"""What all tests share: a word on where the real programs come from."""

from tests.real.programs import find


def pytest_report_header():
    found = find()
    if isinstance(found, str):
        return f"real programs: left out ({found})"
    return f"real programs: in {found.root}"
