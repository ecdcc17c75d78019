"""The demo's stages, on photos of the user's own."""

from PIL import Image

from tests.helpers import run_script
from tests.test_train_net import make_voc

SHORT = (
    *("SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.WARMUP_ITERS", "0", "TEST.EVAL_PERIOD", "0"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
)


def test_photos_go_through_every_stage_once(tmp_path):
    make_voc(tmp_path / "photos")
    out = tmp_path / "out"
    entry = f"voc:{tmp_path}/photos:train"
    result = run_script("tools/demo.py", "--output", str(out), "--data", entry, entry, *SHORT)
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]
    table = (out / "table.md").read_text()
    assert table in result.stdout
    names = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert names == ["teacher", "student", "student, distilled", "the same, inheriting"]
    with Image.open(out / "detections.png") as picture:
        assert picture.width > 300

    again = run_script("tools/demo.py", "--output", str(out), "--data", entry, entry, *SHORT)
    assert again.returncode == 0, again.stderr[-3000:]
    assert again.stdout.count("finished already") == len(names)


def test_a_wrong_data_set_is_named(tmp_path):
    result = run_script("tools/demo.py", "--output", str(tmp_path), "--data", "voc:/nowhere:train", "voc:/nowhere:test")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "error: DATASETS.REGISTER, demo_train: the folder '/nowhere' does not exist" in result.stderr
