"""What is written is there as a whole, or what was there before."""

import pytest

from modeling_bwr_dnc.staging import check_kept, complete_folder, write_text


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


def test_what_a_folder_would_replace_is_known(tmp_path):
    (tmp_path / "model" / "part").mkdir(parents=True)
    (tmp_path / ".incomplete" / "model").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "model")
    for read in ("model", "model/part", "link", ".incomplete/model"):
        with pytest.raises(ValueError, match=f"{read} is read, but writing .*model would remove it; choose"):
            check_kept(tmp_path / read, tmp_path / "model")
    check_kept(tmp_path / "model", tmp_path / "model" / "part")
    check_kept(tmp_path / "missing", tmp_path)


def test_an_unfinished_file_leaves_the_one_before(tmp_path):
    write_text(tmp_path / "results.json", "first")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "results.json", "second \ud800")
    assert (tmp_path / "results.json").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
