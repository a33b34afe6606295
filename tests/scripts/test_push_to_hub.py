"""`scripts.push_to_hub --dry-run` leaves exactly what would be uploaded."""

from scripts import push_to_hub


def test_dry_run_leaves_the_folder_and_uploads_nothing(call_process, tiny_model, tmp_path):
    staged = tmp_path / "staged"
    done = call_process("push_to_hub", "--model", tiny_model, "--repo", "owner/name", "--dry-run", staged)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in staged.iterdir()} == {path.name for path in tiny_model.iterdir()}
    assert "nothing was uploaded" in done.stdout and "model.safetensors" in done.stdout


def test_bad_input_is_refused(assert_refused, tiny_model, tmp_path):
    repo = ["--repo", "owner/name", "--dry-run", tmp_path / "staged"]
    assert_refused("no model folder", push_to_hub, "--model", tmp_path / "nowhere", *repo)
    assert_refused("no config.json", push_to_hub, "--model", tmp_path, *repo)
    wrong = ["--repo", "not a name", "--dry-run", tmp_path / "staged"]
    assert_refused("not a name", push_to_hub, "--model", tiny_model, *wrong)
    assert_refused("nothing can be written", push_to_hub, "--model", tiny_model, *repo[:3], __file__)
    (tmp_path / "staged").mkdir()
    (tmp_path / "staged" / "mine").write_text("x")
    assert_refused("not empty", push_to_hub, "--model", tiny_model, *repo)
