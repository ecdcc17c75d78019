import logging
from collections.abc import Iterator

import pytest
from detectron2.utils.events import EventStorage


@pytest.fixture(autouse=True)
def event_storage():
    """Detectron2's detectors write to an event storage when they compute losses."""
    with EventStorage():
        yield


@pytest.fixture(autouse=True)
def loggers() -> Iterator[None]:
    """Undoes Detectron2's setup_logger, after which pytest's caplog would see more in a test, or nothing."""
    found = [logging.getLogger(name) for name in ("distill", "detectron2", "fvcore")]
    before = [(logger.propagate, logger.level, list(logger.handlers)) for logger in found]
    yield
    for logger, (propagate, level, handlers) in zip(found, before):
        logger.propagate, logger.handlers = propagate, handlers
        logger.setLevel(level)


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is known of images' files goes to a folder of these tests, not to the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FVCORE_CACHE", str(tmp_path_factory.mktemp("cache")))
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
