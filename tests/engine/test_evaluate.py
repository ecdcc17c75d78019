"""How student and teacher are evaluated beside a training."""

from distill.config import override
from distill.engine import evaluate
from distill.recipes import LazyRecipe
from tests.test_train_net_lazy import write_student


def test_a_teachers_own_mapper_reads_the_images_for_it(tmp_path, monkeypatch):
    mapper = (
        "from detectron2.config import LazyCall as L\n\n\ndef read(record):\n    return record\n\n\n"
        "def make(size):\n    return read\n\n\ndataloader.test.mapper = L(make)(size=3)\n"
    )
    path = write_student(tmp_path, more=mapper)
    recipe = LazyRecipe(path, [override("distill.TEACHER.CONFIG_FILE", path), "distill.TEACHER.WEIGHTS=w.pth"])
    seen = []
    monkeypatch.setattr(evaluate, "load_detector", lambda source, role: role)
    monkeypatch.setattr(recipe, "evaluate", lambda model, mapper, folder: seen.append((model, mapper, folder)) or {})
    evaluate.evaluate_teacher(recipe)
    ((model, own, folder),) = seen
    assert (model, folder) == ("teacher", "teacher/inference") and own({"file_name": "x"}) == {"file_name": "x"}
