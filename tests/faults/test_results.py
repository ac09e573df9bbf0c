"""Results: what is no picture is not scored, runs into one folder never mix; and the table of all this is true."""

import pytest
from conftest import ROOT, read_json, run_in_process
from launching import error_of, fork_and_wait

import evaluate
import inference
from common import sampling

JUDGED = ["--clip_model", "none", "--reader", "none", "--steps", 1]


@pytest.mark.fault("a model whose images are NaN", "said, and not scored; what was finished before stays")
def test_images_that_are_no_numbers_are_said_not_scored(tmp_path, monkeypatch, capsys):
    decode, calls = sampling.decode_latents, []

    def broken(vae, latents):
        calls.append(1)
        pixels = decode(vae, latents)
        return pixels * float("nan") if len(calls) > 2 else pixels  # the warm-up and the first configuration are whole

    monkeypatch.setattr(sampling, "decode_latents", broken)
    flags = ["--prompt", "a ring", "a cross", "--steps", 1, 2, "--output_dir", tmp_path, *JUDGED[:4]]
    error = error_of(inference, flags, capsys)
    assert "2 of 2 images are not finite numbers, so they are not scored" in error
    assert [each["steps"] for each in read_json(tmp_path / "results.json")["configurations"]] == [1]


@pytest.mark.fault("a second run into the folder of results", "the first one's are set aside whole, in earlier-1/")
@pytest.mark.parametrize("script", ["inference", "evaluate"])
def test_a_second_run_does_not_mix_with_the_first(tmp_path, script):
    for number in (1, 2, 3):
        more = ["--prompt", f"a ring {number}"] if script == "inference" else ["--models", ROOT / "assets/tiny-sd"]
        more += [] if script == "inference" else ["--prompts_file", tmp_path / "p.txt", "--num_images", number + 1]
        (tmp_path / "p.txt").write_text("a ring\na cross\n")
        module = {"inference": inference, "evaluate": evaluate}[script]
        run_in_process(module, *more, "--output_dir", tmp_path / "out", *JUDGED, "--save_images", 1)
    folders = [tmp_path / "out/earlier-1", tmp_path / "out/earlier-2", tmp_path / "out"]
    for number, folder in enumerate(folders, 1):
        (entry,) = read_json(folder / "results.json")["configurations"]
        assert entry["images"] == (1 if script == "inference" else number + 1)
        images = [path for path in (folder / "images").rglob("*.png")]
        assert images and all(f"a-ring-{number}" in path.name for path in images) or script == "evaluate"
    assert (tmp_path / "out/earlier-1/grid_steps.png").exists() or (tmp_path / "out/earlier-1/grid.png").exists()


def test_a_folder_of_ones_own_is_left_alone(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/mine.png").write_bytes(b"")
    run_in_process(inference, "--prompt", "a ring", "--output_dir", tmp_path, *JUDGED)
    assert (tmp_path / "images/mine.png").is_file() and not (tmp_path / "earlier-1").exists()


def test_the_table_of_faults_is_that_of_the_tests(tmp_path):
    fork_and_wait(tmp_path, ROOT / "tests/list_faults.py", tmp_path / "reliability.md")
    written = (ROOT / "docs/reliability.md").read_text()
    assert (tmp_path / "reliability.md").read_text() == written, "run python tests/list_faults.py"
    assert sum(line.startswith("| ") and "---" not in line for line in written.splitlines()) > 100
