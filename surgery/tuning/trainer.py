"""transformers' Trainer with hooks around each update, and saved states that hold all that is needed to go on."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, get_scheduler
from transformers.trainer_callback import PrinterCallback

from surgery.errors import Refused, did_you_mean
from surgery.tuning.averages import Average, Stock
from surgery.tuning.distil import Teacher
from surgery.tuning.forward import FastForward
from surgery.tuning.gates import Gates
from surgery.tuning.masks import Masks
from surgery.tuning.parts import Parts
from surgery.tuning.regularise import LowRank, Mixout, Pull, clip_each
from surgery.tuning.rows import Stream
from surgery.tuning.settings import Settings
from surgery.tuning.structured import Adapters
from surgery.tuning.through import Through

STATE = "surgery.pt"
WHOLE = "complete"  # marks a saved state that was written to its end
Progress = Callable[[int, int, float], None]


class Diverged(Exception):
    """A loss or gradient is not finite. The parameters are those before the step. step: counted from 1."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(f"step {step}: {what}")
        self.step = step


class Tuner(Trainer):
    """Trains the parameters of `parts` that require gradients; the hooks are set before `train` is called."""

    def __init__(self, model: Any, parts: Parts, settings: Settings, *, passes: float, folder: Path, save: bool,
                 progress: Progress | None, **more: Any) -> None:  # fmt: skip
        self.parts, self.settings = parts, settings
        super().__init__(
            model=model,
            args=arguments(settings, passes, folder, evaluate=more.get("eval_dataset") is not None,
                           loss_only=more.get("compute_metrics") is None),
            callbacks=[_Hooks(self, save)],
            **more,
        )  # fmt: skip
        self.remove_callback(PrinterCallback)
        self.masks: Masks | None = None
        self.average: Average | None = None
        self.pulls: list[Pull | LowRank] = []
        self.forward_again: FastForward | None = None
        self.mixout: Mixout | None = None
        self.gates: Gates | None = None
        self.adapters: Adapters | None = None
        self.through: Through | None = None
        self.teacher: Teacher | None = None
        self.renew: Any = None
        self.progress = progress
        self.losses: list[float] = []
        self.history: list[dict[str, float]] = []

    @property
    def trained(self) -> dict[str, Any]:
        """What the optimizer moves: parameters by name, factors in place of the matrices that they adapt, learned steps."""
        found = {n: p for n, p in self.parts.parameters.items() if p.requires_grad}
        if self.through is not None:
            found |= self.through.parameters
        if self.adapters is None:
            return found
        return {n: p for n, p in found.items() if n not in self.adapters.names} | self.adapters.parameters

    @property
    def own_optimizer(self) -> Any:
        """The torch optimizer inside accelerate's."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    # -- a step ----------------------------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        step = self.state.global_step + 1
        mixed = self.gates or self.mixout
        if mixed is not None:
            with mixed.mixed():
                loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            loss = super().training_step(model, inputs, num_items_in_batch)
        value = float(loss)
        if not math.isfinite(value):
            raise Diverged(step, f"the loss is {value}")
        self.losses.append(value)
        if self.accelerator.sync_gradients:
            for pull in self.pulls:
                pull.on_gradients(self.state.global_step)
            if self.masks is not None:
                self.masks.on_gradients()
            if self.gates is not None:
                self.gates.on_gradients()
            if self.adapters is not None:
                self.adapters.on_gradients()
            norms = [torch.linalg.vector_norm(p.grad) for p in self.trained.values() if p.grad is not None]
            if norms and not bool(torch.isfinite(torch.stack(norms)).all()):
                raise Diverged(step, "a gradient is not finite")
            if self.settings.regularise.get("clip_each"):
                clip_each(self.trained, self.settings.regularise["clip_each"])
        return loss

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The task's loss, of rounded weights if they are trained through; in training with the teacher's."""
        if self.teacher is None or not model.training:
            with self.through.rounded() if self.through is not None else nullcontext():
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        given = dict(inputs)
        with self.through.rounded() if self.through is not None else nullcontext():
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        share = self.teacher.share
        learnt = self.teacher.loss(model, given, outputs, num_items_in_batch if self.model_accepts_loss_kwargs else None)
        loss = share * learnt if share == 1.0 else (1.0 - share) * loss + share * learnt
        return (loss, outputs) if return_outputs else loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """A stream of tasks is in order already."""
        if isinstance(self.train_dataset, Stream):
            return torch.utils.data.SequentialSampler(self.train_dataset)
        return super()._get_train_sampler(train_dataset)

    def create_optimizer(self, model: Any = None) -> Any:
        """Groups by weight decay (matrices only) and, with layer decay, by distance from the output."""
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            groups: dict[tuple[bool, int, float], list[Any]] = {}
            top = self.parts.depth + 1
            for name, p in self.trained.items():
                matrix = Adapters.matrix_of(name).removesuffix(".step")
                height = self.parts.height(matrix) if self.settings.layer_decay is not None else top
                groups.setdefault((p.ndim >= 2, height, self._rate(name)), []).append(p)
            rate = self.settings.layer_decay or 1.0
            if not self.parts.depth and rate != 1.0:
                raise Refused("layer_decay: the model has no blocks")
            self.optimizer = kind(
                [
                    {
                        "params": params,
                        "weight_decay": self.settings.weight_decay if decays else 0.0,
                        "lr": base * rate ** max(0, self.parts.depth - height),
                    }
                    for (decays, height, base), params in sorted(groups.items(), key=lambda item: item[0])
                ],
                **options,
            )
        return self.optimizer

    def _rate(self, name: str) -> float:
        """The learning rate of a parameter without layer decay."""
        if self.through is None or name not in self.through.parameters:
            return self.settings.lr
        return float((self.settings.through or {}).get("step_lr", 0.1 * self.settings.lr))

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Side by side models (stock) go through the same learning rates."""
        if not isinstance(self.average, Stock):
            return super().create_scheduler(num_training_steps, optimizer)
        runs, passes = self.average.runs, int(self.args.num_train_epochs)
        each = num_training_steps // passes
        total = num_training_steps // runs
        scratch = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        plain = get_scheduler(self.args.lr_scheduler_type, scratch, self.args.get_warmup_steps(total), total)
        factor: Callable[[int], float] = plain.lr_lambdas[0] if hasattr(plain, "lr_lambdas") else lambda step: 1.0
        own = self.own_optimizer

        def at(step: int) -> float:
            passed, within = divmod(step, each)
            return factor(passed // runs * each + within)

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(own, at)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    # -- saved states ----------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """What a saved state holds beside transformers' files: trained parameters, buffers, masks, averages, history."""
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(
            {
                "parameters": {n: p.detach() for n, p in self.trained.items()},
                "buffers": dict(self.parts.model.named_buffers()),
                "masks": self.masks.state() if self.masks is not None else {},
                "average": self.average.state() if self.average is not None else {},
                "gates": self.gates.state() if self.gates is not None else {},
                "repeated": self.forward_again.taken if self.forward_again is not None else 0,
                "losses": self.losses,
                "history": self.history,
            },
            folder / STATE,
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = torch.load(Path(resume_from_checkpoint) / STATE, map_location="cpu", weights_only=True)
        self._put(saved["parameters"], self.trained)
        if self.adapters is not None:
            self.adapters.fold()
        self._put(saved["buffers"], dict(self.parts.model.named_buffers()))
        if self.masks is not None:
            self.masks.load(saved["masks"])
        if self.average is not None:
            self.average.load(saved["average"])
        if self.gates is not None:
            self.gates.load(saved["gates"])
        if self.forward_again is not None:
            self.forward_again.taken = saved["repeated"]
        self.losses, self.history = saved["losses"], saved["history"]

    @torch.no_grad()
    def _put(self, values: Mapping[str, Any], targets: Mapping[str, Any]) -> None:
        for name, target in targets.items():
            target.copy_(values[name])


class _Hooks(TrainerCallback):
    """What happens around updates, at the ends of epochs and after saving."""

    def __init__(self, tuner: Tuner, save: bool) -> None:
        self._tuner, self._save = tuner, save
        self._since = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._since = len(self._tuner.losses)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        done = self._tuner.history[-1]["batches"] if self._tuner.history else 0
        self._since = int(done)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._tuner.renew is not None:
            self._tuner.renew.on_step_begin(state.global_step, self._tuner.own_optimizer)
        if self._tuner.forward_again is not None:
            self._tuner.forward_again.on_step_begin(state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._tuner.masks is not None:
            self._tuner.masks.on_update()
        if self._tuner.gates is not None:
            self._tuner.gates.on_update()
        if self._tuner.adapters is not None:
            self._tuner.adapters.fold()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        t = self._tuner
        if t.progress is not None:
            t.progress(state.global_step, state.max_steps, t.losses[-1])
        if t.forward_again is not None:
            t.forward_again.on_step_end(state.global_step)
        if t.average is not None:
            t.average.on_step(state.global_step, state.max_steps, t.own_optimizer)
            if t.adapters is not None:
                t.adapters.fold()  # an average may have put other factors in place
        self._passed(args, state)
        # a state at the end of an epoch is saved after all that happens there, or resuming would leave it out
        ends = state.epoch == int(state.epoch) or state.global_step >= state.max_steps
        every = t.settings.save_every
        control.should_save = self._save and not ends and every is not None and state.global_step % every == 0

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        t = self._tuner
        if t.losses[self._since :]:
            self._record(state)
            if t.forward_again is not None:
                t.history[-1]["repeated"] = t.forward_again.taken
        if t.average is not None:
            t.average.on_epoch(state.global_step, state.max_steps, t.own_optimizer)
        control.should_save = self._save and state.global_step % (t.settings.save_every or 1) == 0

    def _record(self, state: Any, **more: int) -> None:
        """A line of history: the mean loss since the last one."""
        t = self._tuner
        losses = t.losses[self._since :] or t.losses[-1:]  # a stage may be over within the batch that the last one ended in
        t.history.append({"epoch": round(float(state.epoch), 6), "step": state.global_step,
                          "loss": math.fsum(losses) / len(losses), "batches": len(t.losses), **more})  # fmt: skip
        self._since = len(t.losses)

    def _passed(self, args: Any, state: Any) -> None:
        """Of a stream of tasks: a line for every pass over a stage that ended in this step."""
        t = self._tuner
        ends = getattr(t.train_dataset, "ends", ())
        done, seen = sum("stage" in line for line in t.history), len(t.losses) * args.train_batch_size
        for end, stage, number in ends[done:]:
            if end <= seen:
                self._record(state, stage=stage, **{"pass": number})

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        if self._tuner.history:
            self._tuner.history[-1] |= measured(metrics or {})

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / WHOLE).touch()


def measured(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Loss and own metrics of an evaluation, without times."""
    timed = ("runtime", "per_second", "epoch", "preparation_time")
    return {k.replace("eval_", "validation_"): float(v) for k, v in metrics.items() if not k.endswith(timed)}


def last_whole(folder: Path) -> str | None:
    """The latest saved state that is complete."""
    found = [p for p in folder.glob("checkpoint-*") if (p / WHOLE).exists()]
    return str(max(found, key=lambda p: int(p.name.rpartition("-")[2]))) if found else None


def arguments(s: Settings, passes: float, folder: Path, *, evaluate: bool, loss_only: bool) -> TrainingArguments:
    """Settings in transformers' terms. Raises Refused for a device that is absent and for unknown optimizers."""
    from transformers.training_args import OptimizerNames

    if s.device == "cuda" and not torch.cuda.is_available():
        raise Refused("device: cuda was asked for, but torch finds no CUDA device", hint="device: auto, or cpu")
    known = [str(o.value) for o in OptimizerNames]
    if s.optimizer not in known:
        raise Refused(f"optimizer: transformers has no `{s.optimizer}`", hint=did_you_mean(s.optimizer, known))
    cpu = s.device == "cpu" or not torch.cuda.is_available()
    each = bool(s.regularise.get("clip_each"))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    made = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=passes,
        max_steps=s.steps or -1,
        per_device_train_batch_size=s.batch,
        per_device_eval_batch_size=s.batch,
        gradient_accumulation_steps=s.accumulate,
        learning_rate=s.lr,
        lr_scheduler_type=s.schedule,
        warmup_steps=s.warmup,
        weight_decay=s.weight_decay,
        optim=s.optimizer,
        max_grad_norm=0.0 if each else s.regularise["clip"],
        label_smoothing_factor=s.regularise.get("label_smoothing", 0.0),
        neftune_noise_alpha=s.regularise.get("neftune"),
        bf16=s.precision == "bfloat16",
        seed=s.seed,
        data_seed=s.seed,
        use_cpu=cpu,
        dataloader_pin_memory=not cpu,
        remove_unused_columns=False,
        label_names=["labels"],
        prediction_loss_only=loss_only,
        eval_strategy="epoch" if evaluate else "no",
        save_strategy="no",  # the hooks say when
        save_total_limit=2,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
    )
    _ = made.device
    made._n_gpu = min(made._n_gpu, 1)  # one device: several would split batches and change the result
    return made
