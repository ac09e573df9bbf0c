"""The captions that a pipeline is calibrated on before it is pruned, and judged by after."""

from pathlib import Path

from common import shapes
from common.sampling import read_prompts_file

SPLIT = "choose"  # of the held-out shapes: by its report people choose the next ratio; evaluate.py judges that
PROMPTS = Path(__file__).resolve().parents[2] / "prompts" / "coco20.txt"


def calibration_captions(args, dataset):
    """The captions that the pipeline is sampled on to calibrate, a list."""
    if args.calibration_prompts or dataset is None:
        prompts = read_prompts_file(args.calibration_prompts or PROMPTS, "--calibration_prompts")
        return prompts[: args.num_calibration_prompts]
    count = min(args.num_calibration_prompts, dataset.size or args.num_calibration_prompts)
    return [dataset[index, 0, index]["caption"] for index in range(count)]


def judged_captions(args, dataset):
    """The captions that the report judges by, none of which calibrated anything where there are others: a list."""
    if args.dataset_name == "shapes":
        return shapes.held_out_captions(args.num_eval_images, SPLIT)
    if dataset is None:
        captions = read_prompts_file(PROMPTS)
    else:
        first = args.num_calibration_prompts
        last = first + args.num_eval_images if dataset.size is None else dataset.size
        captions = [dataset[i, 0, i]["caption"] for i in range(last)[first : first + args.num_eval_images]]
    return captions[: args.num_eval_images]
