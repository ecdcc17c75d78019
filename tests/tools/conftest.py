import sys

import pytest

from tests.helpers import ROOT


@pytest.fixture(scope="module")
def tools():
    """Modules of tools/ by name."""
    before = list(sys.path)
    sys.path.insert(0, str(ROOT / "tools"))
    import report
    from report_parts import curves, pictures, reading, tables

    yield {"report": report, "curves": curves, "pictures": pictures, "reading": reading, "tables": tables}
    sys.path[:] = before
