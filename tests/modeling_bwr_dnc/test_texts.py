import pytest

from modeling_bwr_dnc.texts import check_text, python_manual, read_text_file


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "empty"), (b" \n", "empty"), (b"\xff\xfe\x00", "not UTF-8"), (b"ELF\0\1", "NUL bytes")],
)
def test_file_that_holds_no_text_is_refused(tmp_path, content, message):
    path = tmp_path / "prompt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_text_file(path)


@pytest.mark.parametrize("name", ["missing.txt", "."])
def test_missing_file_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="no file at"):
        read_text_file(tmp_path / name)


def test_text_is_returned_as_it_is():
    assert check_text("  höhö\n".encode(), "x") == "  höhö\n"


def test_python_manual_is_a_long_text():
    assert len(python_manual()) > 200_000 and "yield" in python_manual()


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    path = tmp_path / "notepad.txt"
    path.write_text("Hello", encoding="utf-8-sig")
    assert read_text_file(path) == "Hello"
