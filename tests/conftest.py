import pytest
from detectron2.utils.events import EventStorage


@pytest.fixture(autouse=True)
def event_storage():
    """Detectron2's detectors write to an event storage when they compute losses."""
    with EventStorage():
        yield


# files whose tests train in processes of their own, for tens of seconds
LONG = (
    "test_train_net",
    "test_train_net_lazy",
    "test_export_lazy",
    "test_evidence",
    "test_demo",
    "test_check_gpu",
    "test_failures",
    "test_distributed",
    "test_hook",
    "test_benchmark",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs long tests first, so that pytest-xdist has short ones left to even out the end with."""
    items.sort(key=lambda item: item.path.stem not in LONG)
