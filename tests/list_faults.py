"""Write docs/reliability.md: every fault and bad input that a test tries, and what happens, from their own marks.

python tests/list_faults.py [FILE]
"""

import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
HEAD = """# What is tried, and what happens

Every line is a test: what people's files, models and machines do, and what the scripts do then. Written by
`python tests/list_faults.py` from the tests themselves, which fail where it isn't true.

`pytest tests/faults --slow` tries what depends on the moment 20 times instead of 3.

"""
TITLES = {
    "test_killed": "Killed",
    "test_runs": "Runs and machines",
    "test_sharded_runs": "Sharded runs",
    "test_models": "Models and LoRAs",
    "test_data_faults": "Data",
    "test_caches": "Caches",
    "test_results": "Results",
    "test_stays": "What works with what people have",
}


class Faults:
    """Collects the fault marks: {file: {what: what happens}}."""

    def __init__(self):
        self.found = {}

    def pytest_collection_finish(self, session):
        for item in session.items:
            for mark in item.iter_markers("fault"):
                self.found.setdefault(item.path.stem, {})[mark.args[0]] = mark.args[1]


def page(found):
    count = sum(map(len, found.values()))
    parts = [HEAD, f"{count} of them:\n"]
    for name, title in TITLES.items():
        rows = [f"| {what} | {happens} |" for what, happens in found.get(name, {}).items()]
        if rows:
            parts += [f"\n## {title}\n| what | what happens |\n|---|---|\n", "\n".join(rows), "\n"]
    return "".join(parts)


if __name__ == "__main__":
    faults = Faults()
    code = pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", str(TESTS / "faults")], plugins=[faults])
    assert code == 0 and set(faults.found) <= set(TITLES), (code, set(faults.found))
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else TESTS.parent / "docs" / "reliability.md"
    target.write_text(page(faults.found))
