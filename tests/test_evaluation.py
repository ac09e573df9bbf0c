"""common/judging/evaluation.py: which evaluation is the best, and what can't be judged."""

from types import SimpleNamespace

import pytest

from common import shapes
from common.errors import UsageError
from common.judging.evaluation import Evaluation, better, check_evaluation


def test_the_best_without_a_clip_is_the_readers_and_without_any_judge_what_it_was():
    """tiny-clip, the default, may be missing: then the reader of scenes is all that judges shapes, if it is there."""
    first = better(None, {"scene_accuracy": 0.5}, 1)
    assert first == {"metric": "scene_accuracy", "value": 0.5, "step": 1, "judges": None}
    assert better(first, {"scene_accuracy": 0.4}, 2) is first
    assert better(first, {"scene_accuracy": 0.6}, 2)["step"] == 2
    assert better(None, {"scene_accuracy": 1.0, "clip_score": 20.0}, 1)["metric"] == "clip_score"
    assert better(None, {}, 1) is None and better(first, {}, 2) is first


def test_an_evaluation_without_a_judge_is_refused():
    args = dict(eval_steps=10, dataset_name="shapes", eval_data_dir=None, num_eval_images=8, clip_model=None)
    args = SimpleNamespace(**args, inception_path=None, lpips_trunk_path=None)
    check_evaluation(args)  # tiny-clip judges shapes
    args.clip_model = "none"
    with pytest.raises(UsageError, match="--eval_steps has no judge"):
        check_evaluation(args)
    for flag in ("inception_path", "lpips_trunk_path"):
        check_evaluation(SimpleNamespace(**{**vars(args), flag: "download"}))
    args.eval_steps = None
    check_evaluation(args)


def test_the_best_is_chosen_on_captions_that_judge_nothing_else():
    args = dict(eval_steps=10, dataset_name="shapes", eval_data_dir=None, num_eval_images=500, clip_model=None)
    args = SimpleNamespace(**args, inception_path=None, lpips_trunk_path=None, seed=0, resolution=32)
    check_evaluation(args)
    evaluation = Evaluation(args, SimpleNamespace(is_main_process=False))
    judging = shapes.held_out_captions(split="judge")
    assert len(evaluation.captions) == 500 and not set(evaluation.captions) & set(judging)
    args.num_eval_images = 501
    with pytest.raises(UsageError, match="--num_eval_images 501: there are 500"):
        check_evaluation(args)
