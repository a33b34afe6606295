"""`scripts.plan_memory` refuses options that it would not heed."""

import pytest

from scripts.plan_memory import build_parser, plan


@pytest.mark.parametrize("others", [["--lengths", "999"], ["--measure"]])
def test_a_length_that_is_looked_for_is_not_given(others):
    with pytest.raises(ValueError, match="--fit is '300MB' .* leave out --lengths and --measure, or --fit"):
        plan(build_parser().parse_args(["--fit", "300MB", *others]))
