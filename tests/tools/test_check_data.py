"""The check of datasets without a training."""

from PIL import Image

from tests.data.test_formats import W, write_flat_voc
from tests.helpers import run_script


def test_draws_what_is_good_and_names_what_is_not(tmp_path):
    write_flat_voc(tmp_path / "good")
    write_flat_voc(tmp_path / "bad", size=(W + 1, 7))
    command = ["tools/check_data.py", f"cells=voc:{tmp_path}/good:all", f"voc:{tmp_path}/bad:all"]
    result = run_script(*command, "--output", f"{tmp_path}/out")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "cells: 4 images, drawn in" in result.stdout
    assert "error: The dataset data2 has faults" in result.stderr
    assert "4 annotations give another width and height" in result.stderr
    with Image.open(tmp_path / "out" / "cells.png") as sheet:
        assert len(set(sheet.convert("L").getdata())) > 20
