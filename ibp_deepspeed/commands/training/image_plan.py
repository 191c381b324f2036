"""What the training of an image classifier consists of, checked before the processes meet."""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ibp_deepspeed.commands.training.arguments import (
    given_hyperparameters,
    parse_overrides,
    parse_partition,
    profile_of_partition,
)
from ibp_deepspeed.commands.training.image_arguments import default_hyperparameters
from ibp_deepspeed.commands.training.job import (
    check_numbers,
    checked,
    processes,
    warn_of_schedule,
    warn_of_unknown_keys,
)
from ibp_deepspeed.commands.training.monitors import monitors_under, reporting_to
from ibp_deepspeed.commands.training.output import check_output
from ibp_deepspeed.commands.training.training_plan import Data, TrainingPlan

if TYPE_CHECKING:
    from ibp_deepspeed.config.interlocking import InterlockingConfig
    from ibp_deepspeed.data.images import ImageData
    from ibp_deepspeed.models.runs.conditions import Changes, Conditions
    from ibp_deepspeed.models.runs.description import Description
    from ibp_deepspeed.models.vision.evaluation import ImageEvaluation
    from ibp_deepspeed.models.vision.image_classifier import ImageClassifier
    from ibp_deepspeed.pipeline import Pipeline
    from ibp_deepspeed.schedule.simulator import Costs


@dataclass
class ImagePlan(TrainingPlan):
    """See :class:`TrainingPlan`.

    Attributes:
        images: the data.
        crop, flip: what is drawn for training images.
    """

    ds_config: dict[str, Any]
    interlocking: InterlockingConfig
    model: ImageClassifier
    num_stages: int
    bounds: list[int]
    replicas: int
    images: ImageData
    crop: bool
    flip: bool
    description: Description
    resume: str | None
    files: dict[str, str]
    changes: Changes | None = None

    counted = "images"

    def per_sample(self, args: argparse.Namespace) -> int:
        """One."""
        return 1

    def flops(self, args: argparse.Namespace) -> float:
        """Of an image."""
        from ibp_deepspeed.models.vision.costs import training_flops

        return training_flops(self.model, self.interlocking, self.bounds)

    def costs(self, args: argparse.Namespace) -> list[Costs]:
        """Of each stage."""
        from ibp_deepspeed.models.vision.costs import stage_costs

        return stage_costs(self.model, self.interlocking, self.bounds)

    def head_parameters(self) -> list[int]:
        """A residual network's heads have more where they read more channels."""
        from ibp_deepspeed.strategy.head_placement import HeadPlacement

        options = self.interlocking.aux_head
        placement = HeadPlacement.from_config(self.interlocking, self.num_stages, options is not None)
        if options is None:
            return []
        return [self.model.head_parameters(options, placement.boundary(k, self.bounds) - 1) for k in placement.heads]

    def label_entropy(self) -> float:
        """Of the classes' frequencies in the training split."""
        import numpy as np

        shares = np.bincount(self.images.train.labels) / len(self.images.train)
        return -sum(float(share) * math.log(share) for share in shares if share)

    def data_digest(self, args: argparse.Namespace) -> str:
        """Of the images, their size and what is drawn for them."""
        conditions = self.description.conditions
        assert conditions is not None
        return conditions.data[:12]

    def data_lines(self, args: argparse.Namespace) -> list[str]:
        """Classes and images."""
        data, size = self.images, self.model.image_size
        return [
            f"images: {len(data.train):,} to train on, {len(data.held_out):,} held out, {len(data.classes)} classes, "
            f"made {size} × {size} ({data.name})"
        ]

    def open_data(self, pipeline: Pipeline, args: argparse.Namespace) -> Data:
        """Images for the first stage, classes for all."""
        from ibp_deepspeed.commands.training.arguments import EVAL_MICRO_BATCHES
        from ibp_deepspeed.commands.training.checkpoints import set_position
        from ibp_deepspeed.data.image_loader import HeldOutImages, ImageLoader

        size, count = pipeline.train_micro_batch_size_per_gpu(), pipeline.gradient_accumulation_steps()
        where: dict[str, Any] = {"data_parallel_rank": pipeline.data_parallel_rank, "data_parallel_size": self.replicas}
        is_first = getattr(pipeline, "is_first_stage", None)
        where["reads_pixels"] = is_first is None or bool(is_first())
        draws = {"seed": args.seed, "crop": self.crop, "flip": self.flip}
        train = ImageLoader(self.images, size, **where, **draws, start=pipeline.global_steps * count)
        set_position(train, self, args)

        def held_out(micro_batches: int | None) -> HeldOutImages:
            samples = None if micro_batches is None else micro_batches * size * self.replicas
            return HeldOutImages(self.images, size, **where, samples=samples)

        on_the_way = args.eval_micro_batches or EVAL_MICRO_BATCHES
        return Data(train, held_out(on_the_way), held_out(args.eval_micro_batches or None))

    def remarks(self, pipeline: Pipeline, args: argparse.Namespace, data: Data) -> list[str]:
        """What is drawn."""
        drawn = [word for word, on in (("shifted", self.crop), ("mirrored", self.flip)) if on]
        return [f"training images are {' and '.join(drawn)} at random" if drawn else "training images are as they are"]

    def evaluate(self, pipeline: Pipeline, held_out: Any) -> ImageEvaluation:
        """Losses and accuracies of all exits."""
        from ibp_deepspeed.models.vision.evaluation import evaluate_images

        return evaluate_images(pipeline, held_out)

    def table(self, evaluation: Any) -> str:
        """Of each exit."""
        text: str = evaluation.table()
        return text


def make_image_plan(args: argparse.Namespace) -> ImagePlan:
    """Check everything that can be checked alone, before the processes meet.

    Raises:
        InterlockingError: one sentence about the first thing that is wrong.
    """
    from ibp_deepspeed.config.auto import fill_auto
    from ibp_deepspeed.config.deepspeed import load_ds_config, resolve_interlocking
    from ibp_deepspeed.data.image_sources import open_images
    from ibp_deepspeed.models.errors import ModelError
    from ibp_deepspeed.models.runs.resume import checkpoint_to_resume
    from ibp_deepspeed.models.vision.config import channels_of, load_image_config
    from ibp_deepspeed.models.vision.image_classifier import ImageClassifier
    from ibp_deepspeed.strategy.timeline import Timeline

    check_output(args)
    num_stages, replicas = processes(args, "train_vision.py")
    check_numbers(args)
    if profile_of_partition(args.partition):
        raise ModelError(f"--partition {args.partition}: profiles are of language models, give numbers of blocks.")
    ds_config = reporting_to(load_ds_config(args.deepspeed_config), args.report_to)
    interlocking = resolve_interlocking(ds_config)
    overrides = parse_overrides(args.set)
    images = open_images(
        args.data, args.image_size, channels_of(args.model, overrides), held_out_fraction=args.held_out_fraction
    )
    hf_config = load_image_config(args.model, images.classes, **overrides)
    model = ImageClassifier(hf_config, args.image_size, seed=args.seed)
    defaults = default_hyperparameters(args)
    ds_config = checked(fill_auto(ds_config, given_hyperparameters(args), defaults, replicas), replicas)
    micro_batches = ds_config["gradient_accumulation_steps"]
    Timeline(interlocking, num_stages, micro_batches, interlocking.aux_head is not None).channel_depth()
    bounds = model.partition(
        num_stages,
        aux_heads=interlocking.aux_head,
        exits=interlocking.exits_for(num_stages),
        manual=parse_partition(args.partition),
    )
    images.train.require(ds_config["train_batch_size"], "a batch")
    if os.environ["RANK"] == "0":
        warn_of_unknown_keys(ds_config)
        warn_of_schedule(ds_config, args.steps)
    drawn = args.augment if args.augment is not None else ["crop", "flip"] if images.flips else ["crop"]
    conditions = _conditions(args, images, drawn, ds_config, replicas)
    description = _description(args, ds_config, model, bounds, interlocking, images, conditions)
    folder, allowed = args.output / "checkpoint", args.allow_changed or ()
    resumption = checkpoint_to_resume(folder, args.resume, description, args.steps, allowed)
    resume, changes = resumption or (None, None)
    return ImagePlan(
        monitors_under(args.output, ds_config),
        interlocking,
        model,
        num_stages,
        bounds,
        replicas,
        images,
        "crop" in drawn,
        "flip" in drawn,
        description,
        resume,
        description.files(),
        changes,
    )


def _conditions(
    args: argparse.Namespace, images: ImageData, drawn: list[str], ds_config: dict[str, Any], replicas: int
) -> Conditions:
    from ibp_deepspeed.data.images import digest_of
    from ibp_deepspeed.models.runs.conditions import Conditions

    what = f"{args.image_size} {args.held_out_fraction} {sorted(drawn)}"
    return Conditions(
        seed=args.seed,
        data=digest_of(images.digest.encode(), what.encode()),
        held_out=images.digest,
        tokenizer="",
        micro_batch_size=ds_config["train_micro_batch_size_per_gpu"],
        micro_batches=ds_config["gradient_accumulation_steps"],
        replicas=replicas,
    )


def _description(
    args: argparse.Namespace,
    ds_config: dict[str, Any],
    model: ImageClassifier,
    bounds: list[int],
    interlocking: InterlockingConfig,
    images: ImageData,
    conditions: Conditions,
) -> Description:
    from ibp_deepspeed.models.runs.description import Description, Images

    mean, deviation = images.statistics
    reads = Images(size=args.image_size, mean=mean, deviation=deviation, held_out_fraction=args.held_out_fraction)
    return Description(
        model=model.hf_config.to_dict(),
        bounds=bounds,
        interlocking=interlocking.model_dump(exclude_unset=True),
        sequence_length=1,
        data=args.data,
        source=images.name,
        settings={key: value for key, value in ds_config.items() if key != "interlocking"},
        images=reads,
        conditions=conditions,
    )
