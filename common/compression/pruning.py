"""Pruning: what goes of a pipeline is chosen, noted in run.state["rounds"], and removed, round by round.

run.state["units"], {component: {group name: units}}, and run.state["parameters"], {component: n}, are of the pipeline
that the run began with, run.state["rounds"] is a list of {component: {group name: units kept}}, in the numbers of the
model as the round found it: what a resumed run needs to cut again without choosing again.
"""

from accelerate.utils import broadcast, broadcast_object_list
from tqdm.auto import tqdm

from common.compression import calibration, channels, planning, students
from common.compression.quantized_folders import refuse_quantized
from common.compression.report import plot_sensitivity
from common.errors import UsageError
from common.pipelines import load_pipeline
from common.randomness import sample_generator
from common.sampling import default_batch_size

SENSITIVITY_CALLS = 4  # recorded forwards that sensitivity is measured on


def few_of(calls):
    """SENSITIVITY_CALLS at most of recorded calls, from the first step to the last."""
    return calls[:: -(-len(calls) // SENSITIVITY_CALLS) or 1]


def choose_units(args, run, pipeline, planned, budget, calls, moments):
    """{component: {group name: units kept, ascending}} of one round, and {component: {group: {ratio: error}}}.

    planned: {component: {kind: ratio}} of what goes by now of what there was at first; budget: {component: parameters
    that are to go} of this round, or {"all": n}; calls: recorded ones, moments: {component: Moments} or {}.
    """
    scores, errors = {}, {}
    for component, kinds in planned.items():
        model = getattr(pipeline, component)
        if args.importance == "taylor":
            generator = sample_generator(args.seed, len(run.state["rounds"]), 0, stream="calibration")
            found = calibration.taylor(model, calls[component], generator)
        elif args.importance == "reconstruction":
            every = tqdm(channels.groups_of(model), desc="importance", leave=False)
            found = {
                group.name: calibration.reconstruction(model, group, moments[component])
                for group in every
                if group.kind in kinds
            }
        else:
            order = 1 if args.importance == "l1" else 2
            found = {group.name: channels.magnitude(model, group, order) for group in channels.groups_of(model)}
        groups = [group for group in channels.groups_of(model) if group.kind in kinds]
        scores[component] = {group.name: found[group.name] for group in groups}
        if args.sensitivity:
            few = {half: few_of(made) for half, made in calls[component].items()}
            errors[component] = calibration.sensitivity(model, few, scores[component], moments.get(component))
    models = {component: getattr(pipeline, component) for component in planned}
    if args.sensitivity and "all" in budget:
        ratios = calibration.allocate(models, errors, budget["all"])
    elif args.sensitivity:
        ratios = {}
        for component, model in models.items():
            ratios.update(calibration.allocate({component: model}, errors, budget[component]))
    kept = {component: {} for component in planned}
    for component, model in models.items():
        for group in channels.groups_of(model):
            if group.kind not in planned[component]:
                continue
            if args.sensitivity:
                count = channels.units_kept(group, ratios[component].get(group.name, 0))
            else:  # of the units that there were at first
                first = run.state["units"][component][group.name]
                count = min(channels.units_kept(group, planned[component][group.kind], first), group.units)
            if count < group.units:
                kept[component][group.name] = channels.choose(scores[component][group.name], count)
    return kept, errors


def calibrate(args, pipeline, components, captions, contract):
    """The recorded calls of these components, of calibration.record_inputs, while the pipeline samples captions."""
    return calibration.record_inputs(
        pipeline,
        components,
        captions,
        [sample_generator(args.seed, index, 0, stream="calibration") for index in range(len(captions))],
        batch_size=1 if args.resolution > 64 else default_batch_size(args.resolution),  # gradients of whole models
        num_inference_steps=contract["steps"] or args.calibration_steps,
        guidance_scale=contract["guidance_scale"],
        height=args.resolution,
        width=args.resolution,
    )


def prune_round(args, run, pipeline, planned, budget, captions, contract):
    """Prune the pipeline in place by one more round: the same on every process, and noted in run.state["rounds"]."""
    number = len(run.state["rounds"])
    run.accelerator.print(f"Pruning, round {number + 1} of {args.iterative}.")
    if args.method in ("magnitude", "width"):
        run.state["rounds"].append({})
        return replay(args, run, pipeline, planned, {}, number)
    share = (number + 1) / args.iterative
    planned = {c: {kind: ratio * share for kind, ratio in kinds.items()} for c, kinds in planned.items()}
    gone = {c: run.state["parameters"][c] - channels.count(getattr(pipeline, c)) for c in planned}
    if "all" in budget:
        budget = {"all": budget["all"] * share - sum(gone.values())}
    else:
        budget = {c: n * share - gone[c] for c, n in budget.items()}
    calls, moments = {}, {}
    if args.importance == "taylor" or args.sensitivity or not args.no_compensation:
        calls = calibrate(args, pipeline, planned, captions, contract)
    if not args.no_compensation:
        moments = {c: calibration.Moments(getattr(pipeline, c), calls[c]) for c in planned}
    kept, errors = choose_units(args, run, pipeline, planned, budget, calls, moments)
    kept = broadcast_object_list([kept])[0]
    for component, found in moments.items():
        calibration.compensate(getattr(pipeline, component), kept[component], found)
    if errors and run.accelerator.is_main_process:
        plot_sensitivity(errors, run.folder / "sensitivity.png")
    run.state["rounds"].append(kept)
    run.state["errors"] = errors or run.state.get("errors", {})
    replay(args, run, pipeline, planned, kept, number)


def replay(args, run, pipeline, planned, kept, number):
    """Cut a round again whose choice is known: what a resumed run does for the rounds that were."""
    for component, kinds in planned.items():
        model = getattr(pipeline, component)
        if args.method == "width":
            widths = planning.narrower(model.config, kinds["conv"])
            pipeline.unet, manifest = students.build_student(model, block_out_channels=widths)
            run.state["keep"] = manifest["keep"]
        elif args.method == "magnitude":
            channels.zero_smallest(model, max(kinds.values()) * (number + 1) / args.iterative, args.pattern)
        else:
            channels.prune(model, kept.get(component, {}))
        for p in getattr(pipeline, component).parameters():  # processes on other machines round otherwise
            broadcast(p.data)


# From Python, without the script.

METHODS = {"magnitude": channels.KINDS, "structured": ("conv", "feed_forward"), "heads": ("attention",)}


def apply_magnitude_pruning(model, amount=0.3, pattern="unstructured"):
    """Set `amount`, in [0, 1), of the weights of a model's prunable layers to zero, in place; returns the model.

    pattern: see channels.zero_smallest. Raises UsageError.
    """
    if not 0 <= amount < 1:
        raise UsageError(f"amount {amount} is not in [0, 1).")
    channels.zero_smallest(model, amount, pattern)
    return model


def create_pruned_pipeline(model_path, pruning_amount=0.3, method="magnitude"):
    """A pipeline folder or hub id, loaded and pruned by L2 norm, ready to sample; safetensors only.

    pruning_amount: in [0, 1), of the UNet or transformer. method: "magnitude" (weights become zero), "structured"
    (channels of resnets and feed-forwards go) or "heads" (attention heads go). For importance, compensation, recovery
    and the rest of the pipeline there is prune_and_quantize.py. Raises UsageError and ModelError.
    """
    if method not in METHODS:
        raise UsageError(f"method {method} is none of {', '.join(METHODS)}.")
    refuse_quantized(model_path, flag="model_path")
    return prune_pipeline(load_pipeline(model_path, flag="model_path"), pruning_amount, method)


def prune_pipeline(pipeline, pruning_amount, method):
    """Prune the UNet or transformer of a loaded pipeline, in place: see create_pruned_pipeline."""
    kinds = METHODS[method]
    name = "unet" if hasattr(pipeline, "unet") else "transformer"
    model = getattr(pipeline, name)
    if method == "magnitude":
        apply_magnitude_pruning(model, pruning_amount)
        return pipeline
    if not 0 <= pruning_amount < 1:
        raise UsageError(f"pruning_amount {pruning_amount} is not in [0, 1).")
    kept = {}
    for group in channels.groups_of(model):
        if group.kind in kinds:
            scores = channels.magnitude(model, group, order=2)
            kept[group.name] = channels.choose(scores, channels.units_kept(group, pruning_amount))
    channels.prune(model, kept)
    pipeline.register_modules(**{name: model})  # of another class now, which `save_pretrained` is to name
    return pipeline
