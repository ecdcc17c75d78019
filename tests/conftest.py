import pytest
from detectron2.utils.events import EventStorage


@pytest.fixture(autouse=True)
def event_storage():
    """Detectron2's detectors write to an event storage when they compute losses."""
    with EventStorage():
        yield
