"""`scripts.demo` refuses in one line what would fail after minutes; `make demo` runs the whole of it."""

from scripts import demo


def test_bad_input_is_refused_at_once(assert_refused, tmp_path):
    assert_refused("at least 1024", demo, "--output", tmp_path, "--num-tokens", -5)
    assert_refused("nothing can be written", demo, "--output", __file__)
