"""What is written is there as a whole, or what was there before."""

import pytest

from modeling_bwr_dnc.staging import complete_folder, write_text


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError("disk full"), RuntimeError("unexpected pos 5 vs 7")])
def test_an_unfinished_folder_leaves_the_one_before(tmp_path, stop):
    with complete_folder(tmp_path / "model") as folder:
        (folder / "weights").write_text("first")
    with pytest.raises(KeyboardInterrupt if stop is KeyboardInterrupt else OSError):
        with complete_folder(tmp_path / "model") as folder:
            (folder / "weights").write_text("second")
            raise stop
    assert (tmp_path / "model" / "weights").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_unfinished_file_leaves_the_one_before(tmp_path):
    write_text(tmp_path / "results.json", "first")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "results.json", "second \ud800")
    assert (tmp_path / "results.json").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
