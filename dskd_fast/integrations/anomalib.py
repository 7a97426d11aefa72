"""DSKD as a model of anomalib (extra `anomalib`: 2.2 and later), beside its own.

`Dskd` has this package's networks, losses, recipe and scores; anomalib has the data modules, the loop, checkpoints,
figures and pictures.
"""

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import torch
from anomalib import LearningType
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.visualization import Visualizer
from torch import Tensor, nn

from dskd_fast.choices import DEFAULT_TEACHER
from dskd_fast.data.augment import for_category
from dskd_fast.data.category import Category
from dskd_fast.data.images import MIN_SIDE
from dskd_fast.detection import export as exporting
from dskd_fast.detection.calibrate import calibrate_on
from dskd_fast.detection.detector import calibration_of
from dskd_fast.device import numerics
from dskd_fast.errors import UserError
from dskd_fast.integrations.anomalib_fitting import Fitting, NormalImages, check_callbacks, train_and_validation
from dskd_fast.integrations.anomalib_parts import (
    DskdNetwork,
    DskdPostProcessor,
    DskdPreProcessor,
    ExportedDskd,
)
from dskd_fast.ops.portable import without_operators
from dskd_fast.progress import log
from dskd_fast.runs import folder as runs
from dskd_fast.runs.history import Epoch
from dskd_fast.runs.options import RECIPE_OPTIONS, TrainingOptions, default_recipe, recipe_options
from dskd_fast.training.checks import check_batches
from dskd_fast.training.distributed import ALONE
from dskd_fast.training.recipe import ADAM_BETAS, first_networks, learning_rate

# Options that are arguments of `Dskd`, and those that are not the model's here, with whose they are.
_ARGUMENTS = ("teacher", "image_size", "epochs", "seed")
_OTHERS = {
    "batch_size": "set train_batch_size of the data module",
    "precision": "set precision of the Engine",
    "device": "set accelerator of the Engine",
    "compile": "call torch.compile yourself",
    "bits": "anomalib reads images itself, as 8 bits",
}
_COMPONENTS = ("pre_processor", "post_processor", "evaluator", "visualizer")


class Dskd(AnomalibModule):
    """Contextual Affinity Distillation (arXiv 2307.03101): structural and logical anomalies, from normal images.

    What differs from other models of anomalib, so that the result is that of `dskd-fast train`:

    - The recipe says how long a training is; `max_epochs` of an Engine is overridden, `epochs` here is not. There is no
      best epoch, since no normal image tells it: leave out `EarlyStopping` and `ModelCheckpoint(monitor=...)`.
    - Nothing is validated while it trains. At the end of the last epoch, before its checkpoint is written, the averages
      of the weights become the weights, and the training and the normal validation images set all statistics and the
      threshold. Of a checkpoint from before that, `test` and `predict` say that it has to be trained to the end.
    - Validation images that are anomalous, or test images, too, are left out, and it is an error if none remains. So
      `val_split_mode="same_as_test"`, the default of `MVTecAD`, has to be replaced: `val_split_mode="from_train",
      val_split_ratio=0.1`. `MVTecLOCO` needs nothing. `Folder` takes half of the normal test images; with
      "from_train" none.
    - `pred_score` and `anomaly_map` lie between 0 and 1 with the threshold at 0.5, by a curve that depends on no image
      (`DskdPostProcessor`); with `post_processor=False` they are in this package's unit. `pred_label` is also true of
      images that are far too dark, bright or flat.
    - Images become S x S, without a crop, and are normalised within the networks, by the teacher's own figures. Pass no
      `Normalize`. The recipe "fast" is for `train_batch_size=8`, "paper" for 16: anomalib's 32 takes as many steps, so
      several times as long, and a warning says so.
    - anomalib reads an image's pixels as they are stored, without the EXIF orientation, and those of 16 bits wrongly:
      make 8-bit images of these.
    - A training with one process is tested; with several, each calibrates on all images.

    Args:
        teacher: "wide_resnet50_2" (the paper's, downloaded by timm), "lite" (comes with a package), or a timm backbone.
        recipe: "paper", or "fast", 400 steps for minutes on a processor; None: "fast" for "lite", else "paper".
        image_size: S.
        epochs: of the training; None is the recipe's number.
        seed: of initial weights and augmentation. The order of the images is of the data module: `seed_everything` of
            Lightning fixes that.
        options: others of `dskd_fast.runs.options.TrainingOptions`, such as `{"gccb": 256, "scoring": "paper"}`.
        pre_trained: load the teacher's weights. False: all weights are arbitrary, for a state that is to be loaded.
        pre_processor, post_processor, evaluator, visualizer: as in anomalib.

    Raises:
        UserError: what an option says is not possible, or weights cannot be had.

    Example:
        Not run here, since anomalib is no requirement of this package::

            from anomalib.data import Folder
            from anomalib.engine import Engine
            from dskd_fast.integrations.anomalib import Dskd

            data = Folder("part", root="my_part", normal_dir="train/good", abnormal_dir="test/bad",
                          normal_test_dir="test/good", train_batch_size=8, val_split_mode="from_train",
                          val_split_ratio=0.1)
            model, engine = Dskd(teacher="lite", image_size=128), Engine()
            engine.fit(model, datamodule=data)
            engine.test(model, datamodule=data)
            model.save_run("my_run")  # for `dskd-fast predict my_run new_images`
    """

    def __init__(
        self,
        teacher: str = DEFAULT_TEACHER,
        recipe: str | None = None,
        image_size: int = 256,
        epochs: int | None = None,
        seed: int = 0,
        options: dict[str, Any] | None = None,
        pre_trained: bool = True,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        super().__init__(
            pre_processor=DskdPreProcessor(image_size) if pre_processor is True else pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.recipe = recipe or default_recipe(teacher)
        if self.recipe not in RECIPE_OPTIONS:
            raise UserError(f"there is no recipe {self.recipe!r}: use one of {', '.join(RECIPE_OPTIONS)}")
        self.epochs = epochs
        self._given = {"teacher": teacher, "image_size": image_size, "seed": seed, **_checked(options or {})}
        self._given |= {} if epochs is None else {"epochs": epochs}
        starting = TrainingOptions(**recipe_options(self.recipe, 1, self._given))
        networks = first_networks(starting, pretrained=True) if pre_trained else starting.networks(pretrained=False)
        self.model = DskdNetwork(networks, starting, has_weights=pre_trained)
        self._fitting: Fitting | None = None
        self._resumed: dict[str, Any] | None = None

    # -------------------------------------------------------------------------------------- anomalib's conventions

    @property
    def learning_type(self) -> LearningType:
        return LearningType.ONE_CLASS

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """-1 epochs until the number of images is known; no validation, which nothing would come from."""
        return {"max_epochs": self.epochs or -1, "num_sanity_val_steps": 0, "limit_val_batches": 0}

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> DskdPreProcessor:
        return DskdPreProcessor((image_size or (256, 256))[0])

    def configure_post_processor(self) -> DskdPostProcessor:
        return DskdPostProcessor()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The recipe's Adam; `on_train_batch_start` sets its learning rate."""
        parameters = [p for p in self.model.networks.parameters() if p.requires_grad]
        return torch.optim.Adam(parameters, lr=self.model_options.lr, betas=ADAM_BETAS, fused=True)

    @property
    def model_options(self) -> TrainingOptions:
        """The options as far as they are known: all of them once a training has begun."""
        if self._fitting is not None:
            return self._fitting.options
        recorded = self.model.record["config"].get("options")
        return TrainingOptions(**recorded or recipe_options(self.recipe, 1, self._given))

    # -------------------------------------------------------------------------------------- training

    def on_train_start(self) -> None:
        """Find out what depends on the images: epochs, batches, augmentation, which validation images are normal."""
        if not self.model.has_weights:
            raise UserError("the model was made with pre_trained=False and has no weights: leave that out to train")
        check_callbacks(self.trainer)
        data = self.trainer.datamodule
        train, validation = train_and_validation(data)
        batch_size = self.trainer.train_dataloader.batch_size
        n = min(len(self.trainer.train_dataloader.dataset), self.trainer.num_training_batches * batch_size)
        recipe = recipe_options(self.recipe, n, {**self._given, "batch_size": batch_size})
        name = getattr(data, "category", "") or data.name
        recipe.setdefault("augmentation", for_category(name, self.recipe).to_text())
        recipe["precision"] = "bf16" if str(self.trainer.precision).startswith("bf16") else "fp32"
        options = TrainingOptions(**recipe)
        usual = recipe_options(self.recipe, n, {}).get("batch_size", TrainingOptions.batch_size)
        if batch_size > usual:
            log.warning(
                "warning: batches of %d images, where the recipe %s has %d: as many steps take that much longer; set "
                "train_batch_size=%d of the data module",
                *(batch_size, self.recipe, usual, usual),
            )
        check_batches(self.model.networks, n, options, ALONE)
        self.trainer.fit_loop.max_epochs = options.epochs
        if self.model.detector.calibration is not None and self.trainer.current_epoch >= options.epochs:
            return  # the checkpoint is of a training that has finished
        root = Path(os.path.commonpath([path.parent for path in (*train.paths, *validation.paths)]))
        category = Category(name, root, "folder", train.paths, validation.paths, "folder", (), None)
        if self._resumed is None:
            self.model.record = {"config": {}, "history": []}
        self.model.record["config"] = runs.describe(options, category, holdout=0.0)
        self.model.detector.calibration = None
        # Lightning leaves each module in the mode in which it finds it.
        self.model.train()
        self._fitting = Fitting(self.model, options, n, (train, validation))
        if self._resumed is not None:
            self._fitting.load_state(self._resumed)
            self._resumed = None

    def on_train_epoch_start(self) -> None:
        self._fit.begin_epoch()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        fit, options = self._fit, self._fit.options
        n_batches = math.ceil(fit.n_images / options.batch_size)
        seen = min(batch_idx * options.batch_size / fit.n_images, 1.0)
        done = (self.trainer.current_epoch + seen) / options.epochs
        for parameters in self.optimizers().param_groups:
            parameters["lr"] = learning_rate(options, done, 1 / (options.epochs * n_batches))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The sum of the students' losses."""
        fit = self._fit
        images = batch.image.as_subclass(Tensor).contiguous(memory_format=torch.channels_last)
        images = fit.augment(images, fit.random)
        of_teacher = fit.teacher(images)
        with numerics(fit.options.precision, images.device):
            losses = fit.losses(self.model.networks(images, of_teacher))
        fit.count(losses, len(images))
        for name, loss in zip(self.model.networks.students, losses, strict=True):
            self.log(f"{name}_loss", loss.detach(), on_step=False, on_epoch=True, batch_size=len(images))
        loss = torch.stack(losses).sum()
        self.log("train_loss", loss.detach(), on_step=True, on_epoch=True, prog_bar=True, batch_size=len(images))
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self._fit.averages.update()

    def on_train_epoch_end(self) -> None:
        """Called before the epoch's checkpoint is written, which is to hold the calibration of the last one."""
        self._fit.end_epoch(self.model)
        max_steps, epochs = self.trainer.max_steps, self._fit.options.epochs
        has_all_steps = 0 < max_steps <= self.trainer.global_step
        if self.trainer.should_stop or has_all_steps or self.trainer.current_epoch + 1 >= epochs:
            self._finish()

    def on_train_end(self) -> None:
        if self._fitting is not None:
            log.warning("the training was stopped early: the last checkpoint is from before the calibration")
            self._finish()

    def _finish(self) -> None:
        fit, detector = self._fit, self.model.detector
        fit.averages.apply()
        train, validation = fit.images
        data = self.trainer.datamodule
        # As validation images are read: what augments training images is not for these.
        transform = data.val_data.augmentations or getattr(self.pre_processor, "transform", None)
        subsets = [(subset.dataset, subset.positions) for subset in (train, validation)]
        images = NormalImages(subsets, transform, data.num_workers)
        self.model.eval()
        calibrate_on(detector, images, len(train.positions), fit.options.batch_size)
        for warning in calibration_of(detector).warnings:
            log.warning("warning: %s", warning)
        self._share_threshold()
        self._fitting = None

    def _share_threshold(self) -> None:
        if isinstance(self.post_processor, DskdPostProcessor):
            self.post_processor.set_threshold(self.model.threshold)

    @property
    def _fit(self) -> "Fitting":
        assert self._fitting is not None  # from `on_train_start` to the end of the last epoch
        return self._fitting

    # -------------------------------------------------------------------------------------- checkpoints, files, runs

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Tensors and plain values alone, so that `torch.load(..., weights_only=True)` reads them."""
        super().on_save_checkpoint(checkpoint)
        arguments = {name: x for name, x in checkpoint["hyper_parameters"].items() if name not in _COMPONENTS}
        # The state has the teacher's weights, too, which need not be had once more.
        checkpoint["hyper_parameters"] = arguments | {"pre_trained": False}
        if self._fitting is not None:
            checkpoint["dskd_fast"] = self._fitting.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._resumed = checkpoint.get("dskd_fast")

    def to_onnx(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Path:
        """Write the model as an ONNX file, from which anomalib makes OpenVINO's, too.

        Its input is float32 RGB (B, 3, H, W) from 0 to 1, each side at least 32 pixels. All is in float32; a runtime
        that computes in less gives NaN and calls all images anomalous: to OpenVINO on processors with bf16 say
        `{"INFERENCE_PRECISION_HINT": "f32"}`.

        Args:
            export_root, model_file_name: the file is EXPORT_ROOT/weights/onnx/NAME.onnx.
            input_size: H and W; None leaves them free.

        Raises:
            UserError: the model is not calibrated, or ONNX cannot express its teacher.
            TypeError: others of the exporter's arguments, which would change what has been tested.
        """
        if kwargs:
            raise TypeError(f"{', '.join(kwargs)}: the exporter's arguments are fixed, so leave them out")
        exported = ExportedDskd(self.pre_processor, self.model, self.post_processor).eval()
        side = self.model.networks.image_size
        example = torch.zeros((2, 3, *(input_size or (side + 3, side + 5))), device=self.device)
        free: dict[int, Any] = {0: torch.export.Dim("batch")}
        if input_size is None:
            free |= {2 + i: torch.export.Dim(name, min=MIN_SIDE) for i, name in enumerate(("height", "width"))}
        with torch.no_grad():
            outputs = [*exported(example)]
            with without_operators():
                program = torch.export.export(exported, (example,), dynamic_shapes={"images": free}, strict=False)
        folder = Path(export_root) / "weights" / "onnx"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{model_file_name}.onnx"
        written = exporting.to_onnx(program, ["input"], outputs, self.model.networks.teacher.name)
        written.save(path, external_data=False)
        return path

    @classmethod
    def from_run(cls, folder: str | os.PathLike[str], **components: Any) -> "Dskd":
        """The model of a run folder that `dskd-fast train` or `save_run` wrote.

        Args:
            folder: of the run.
            components: `pre_processor` and so on, as of the class.

        Raises:
            UserError: it is no complete run, has no threshold, or is of images of more than 8 bits or of bf16.
        """
        detector, options, config = runs.read_run(Path(folder), "cpu")
        if options.bits is not None or detector.precision != "fp32":
            raise UserError(f"{folder} is of images of more than 8 bits or scores in bf16, which is not possible here")
        content = dataclasses.asdict(options)
        others = {name: x for name, x in content.items() if name not in (*_ARGUMENTS, *_OTHERS)}
        arguments = {name: content[name] for name in _ARGUMENTS}
        model = cls(recipe="paper", options=others, pre_trained=False, **arguments, **components)
        network = model.model
        network.networks.load_state_dict(detector.model.state_dict())
        if network.calibrated is not None and detector.calibrated is not None:
            network.calibrated.load(detector.calibrated.state_dict())
        network.detector.calibration = detector.calibration
        network.has_weights = True
        network.record = {"config": config, "history": runs.read_json(Path(folder) / runs.HISTORY)}
        model._share_threshold()
        return model.eval()

    def save_run(self, folder: str | os.PathLike[str]) -> None:
        """Write a run folder for `dskd-fast predict`, `watch`, `export` and the others.

        Args:
            folder: must not exist, or be empty.

        Raises:
            UserError: the model is not calibrated yet, or the folder cannot be written.
        """
        self.model.check_calibrated()
        path, record = Path(folder), self.model.record
        with runs.claimed(path, is_new=True):
            runs.write_json(path / runs.CONFIG, record["config"])
            history = [Epoch(**epoch) for epoch in record["history"]]
            runs.save_run(path, self.model.detector, self.model_options, history)


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    for name in options:
        if name in _ARGUMENTS:
            raise UserError(f"{name} is not among the options: it is an argument of its own")
        if name in _OTHERS:
            raise UserError(f"{name} is not among the options: {_OTHERS[name]}")
        if name not in TrainingOptions.__dataclass_fields__:
            raise UserError(f"there is no option {name}: see dskd_fast.runs.options.TrainingOptions")
    return options
